"""The two problems of `benchmarks.tensor`: a Llama's mean loss, and an MLP; and what both are on one device."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from seqloom import Batch
from seqloom.model import Float64Islands, build_model

Results = Mapping[str, Tensor]
"""What a run computes: of the Llama `loss` and every gradient by its name, of the MLP `out`, `x` and those."""


@dataclass(frozen=True)
class Llama:
    """The mean loss of a Llama on one row of tokens, and its gradients, float32."""

    tokens: int = 1024
    hidden: int = 512
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    intermediate: int = 1408
    vocabulary: int = 4096

    @property
    def title(self) -> str:
        """The problem in words."""
        return (
            f"Llama of {self.layers} layers, hidden {self.hidden}, {self.heads} heads ({self.kv_heads} key/value), "
            f"intermediate {self.intermediate}, vocabulary {self.vocabulary:,}; {self.tokens:,} tokens"
        )

    def few(self, tokens: int) -> "Llama":
        """The same on fewer tokens."""
        return replace(self, tokens=min(tokens, self.tokens))

    def half(self, parts: int) -> "Llama":
        """What one of `parts` ranks computes of it: fewer heads, less intermediate width and vocabulary."""
        names = ("heads", "kv_heads", "intermediate", "vocabulary")
        return replace(self, **{name: getattr(self, name) // parts for name in names})

    def model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The untouched model with torch's fused attention, the same weights in every process."""
        settings = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "tie_word_embeddings": False,
        }
        model = build_model(settings, dtype=dtype)
        model.set_attn_implementation("sdpa")
        return model

    def batch(self) -> Batch:
        """The same tokens in every process."""
        draw = torch.Generator().manual_seed(self.tokens)
        return Batch.from_tokens(torch.randint(self.vocabulary, (1, self.tokens), generator=draw))

    def truth(self) -> Results:
        """Loss and gradients in float64."""
        with Float64Islands():
            return loss_and_gradients(self.model(torch.float64), self.batch())


@dataclass(frozen=True)
class Mlp:
    """GELU between two linears with biases, the gradient of the output given, float32."""

    tokens: int = 1024
    width: int = 1024
    inner: int = 4096

    @property
    def title(self) -> str:
        """The problem in words."""
        return f"MLP {self.width:,} to {self.inner:,} to {self.width:,} with GELU and biases; {self.tokens:,} tokens"

    def few(self, tokens: int) -> "Mlp":
        """The same on fewer tokens."""
        return replace(self, tokens=min(tokens, self.tokens))

    def half(self, parts: int) -> "Mlp":
        """What one of `parts` ranks computes of it."""
        return replace(self, inner=self.inner // parts)

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """x and dout [1, tokens, width], weights [out, in] and biases, the same in every process."""
        draw = torch.Generator().manual_seed(self.tokens)
        shapes = {
            "x": (1, self.tokens, self.width),
            "dout": (1, self.tokens, self.width),
            "up.weight": (self.inner, self.width),
            "up.bias": (self.inner,),
            "down.weight": (self.width, self.inner),
            "down.bias": (self.width,),
        }
        drawn = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
        return {
            name: (x * x.shape[-1] ** -0.5 if name.endswith("weight") else x).to(torch.float32).to(dtype)
            for name, x in drawn.items()
        }

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """up, gelu, down, as plain modules."""
        given = self.tensors(dtype)
        sizes = {"up": (self.width, self.inner), "down": (self.inner, self.width)}
        linears = {name: nn.Linear(*size, dtype=dtype) for name, size in sizes.items()}
        for name, linear in linears.items():
            linear.load_state_dict({key: given[f"{name}.{key}"] for key in ("weight", "bias")})
        module = nn.Sequential()
        for name, each in (("up", linears["up"]), ("gelu", nn.GELU()), ("down", linears["down"])):
            module.add_module(name, each)
        return module

    def truth(self) -> Results:
        """Output and gradients in float64."""
        given = self.tensors(torch.float64)
        return output_and_gradients(self.module(torch.float64), given["x"].requires_grad_(), given["dout"])


Problem = Llama | Mlp


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean loss over all labels by an untouched model, all logits at once."""
    return cross_entropy(plain_logits(model, batch).flatten(0, 1), batch.labels.flatten())


def plain_logits(model: nn.Module, batch: Batch) -> Tensor:
    """[1, tokens, vocabulary] of transformers' model: its layers, then its head."""
    positions = torch.arange(batch.num_tokens)[None]
    hidden = model.model(input_ids=batch.tokens, position_ids=positions, use_cache=False).last_hidden_state
    return model.lm_head(hidden)


def loss_and_gradients(model: nn.Module, batch: Batch) -> Results:
    """One run of an untouched model."""
    model.zero_grad(set_to_none=True)
    loss = plain_loss(model, batch)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def output_and_gradients(module: nn.Module, x: Tensor, dout: Tensor) -> Results:
    """One run of a module on x [1, tokens, width], whose output has the gradient dout."""
    module.zero_grad(set_to_none=True)
    x.grad = None
    out = module(x)
    out.backward(dout)
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad, **gradients(module)}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of every parameter that has one, by name."""
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
