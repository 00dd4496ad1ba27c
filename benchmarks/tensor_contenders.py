"""What `benchmarks.tensor` times against each other: one process, the ceiling, and seqloom's plans, on two problems.

All contenders of a problem start from the same weights and tokens, which each takes as its interface wants them. A run
is forward and backward once, gradients made anew and whatever sums they need included; no optimizer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn.functional import cross_entropy, gelu
from transformers import PreTrainedModel

from seqloom import Batch, Fabric, Plan, shard_batch
from seqloom.errors import SeqloomError
from seqloom.fabric import all_reduce_
from seqloom.model import build_model, parallelize, sum_gradients, token_loss
from seqloom.model.whole import whole_tensors
from seqloom.tensor import ParallelLinear, TensorGroup, scatter_to_sequence_parallel_region, whole
from seqloom.verify.lift import Float64Islands

RANKS = 2
Results = Mapping[str, Tensor]
"""What a run computed, whole: for the model `loss` and gradients by name, for the MLP `out`, `x` and its weights."""


class Unavailable(Exception):
    """This contender cannot run here; the message says why."""


class Prepared(NamedTuple):
    """A contender ready to run.

    run: forward and backward once. results: of the last run, whole; every rank calls it; None where this rank
    took no part. sent: bytes this rank has sent in one run by seqloom's own meter, where it has one.
    """

    run: Callable[[], object]
    results: Callable[[], Results | None]
    sent: Callable[[], int] | None = None
    close: Callable[[], None] = lambda: None


class Contender(NamedTuple):
    """name, kind (one of `one`, `ceiling`, `ours`, `peer`) and how it is made ready on this rank."""

    name: str
    kind: str
    prepare: Callable[[Any], Prepared]


@dataclass(frozen=True)
class Llama:
    """The first problem: the mean loss of a Llama on one row of tokens, and its gradients, float32."""

    tokens: int = 1024
    hidden: int = 512
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    intermediate: int = 1408
    vocabulary: int = 4096

    @property
    def title(self) -> str:
        """The problem in words."""
        return (
            f"Llama of {self.layers} layers, hidden {self.hidden}, {self.heads} heads ({self.kv_heads} key/value), "
            f"intermediate {self.intermediate}, vocabulary {self.vocabulary:,}; {self.tokens:,} tokens"
        )

    def model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The untouched model, the same on every rank."""
        settings = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": Llama.hidden // Llama.heads if self.hidden == Llama.hidden else self.hidden // self.heads,
            "max_position_embeddings": self.tokens,
            "tie_word_embeddings": False,
        }
        model = build_model(settings, dtype=dtype)
        model.set_attn_implementation("sdpa")
        return model

    def batch(self) -> Batch:
        """The same tokens on every rank."""
        draw = torch.Generator().manual_seed(self.tokens)
        return Batch.from_tokens(torch.randint(self.vocabulary, (1, self.tokens), generator=draw))

    def few(self, tokens: int) -> "Llama":
        """The same on fewer tokens."""
        return replace(self, tokens=min(tokens, self.tokens))

    def truth(self) -> Results:
        """Loss and gradients in float64."""
        with Float64Islands():
            model = self.model(torch.float64)
            loss = plain_loss(model, self.batch())
            loss.backward()
        return {"loss": loss.detach()} | gradients(model)


@dataclass(frozen=True)
class Mlp:
    """The second problem: GELU between two linears with biases, the gradient of its output given, float32."""

    tokens: int = 1024
    width: int = 1024
    inner: int = 4096

    @property
    def title(self) -> str:
        """The problem in words."""
        return f"MLP {self.width:,} -> {self.inner:,} -> {self.width:,} with GELU; {self.tokens:,} tokens"

    def few(self, tokens: int) -> "Mlp":
        """The same on fewer tokens."""
        return replace(self, tokens=min(tokens, self.tokens))

    def tensors(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """x and the gradient of the output [1, tokens, width], and the weights, the same on every rank."""
        draw = torch.Generator().manual_seed(self.tokens)
        shapes = {
            "x": (1, self.tokens, self.width),
            "dout": (1, self.tokens, self.width),
            "up.weight": (self.inner, self.width),
            "up.bias": (self.inner,),
            "down.weight": (self.width, self.inner),
            "down.bias": (self.width,),
        }
        drawn = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        return {name: (x * x.shape[-1] ** -0.5 if "weight" in name else x).to(dtype) for name, x in drawn.items()}

    def module(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The plain module with these weights."""
        given = self.tensors(dtype)
        module = nn.Sequential()
        for name in ("up", "down"):
            linear = nn.Linear(*reversed(given[f"{name}.weight"].shape), dtype=dtype)
            linear.load_state_dict({key: given[f"{name}.{key}"] for key in ("weight", "bias")})
            module.add_module(name, linear)
            if name == "up":
                module.add_module("gelu", nn.GELU())
        return module

    def truth(self) -> Results:
        """Output and gradients in float64."""
        given, module = self.tensors(torch.float64), self.module(torch.float64)
        x = given["x"].requires_grad_()
        out = module(x)
        out.backward(given["dout"])
        return {"out": out.detach(), "x": x.grad} | gradients(module)


def plain_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The mean loss over all labels by the untouched model, all logits at once."""
    positions = torch.arange(batch.num_tokens)[None]
    hidden = model.model(input_ids=batch.tokens, position_ids=positions, use_cache=False).last_hidden_state
    return cross_entropy(model.lm_head(hidden).flatten(0, 1), batch.labels.flatten())


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of every parameter, by name."""
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def clear(module: nn.Module) -> None:
    """Drop the gradients of the run before."""
    module.zero_grad(set_to_none=True)


def _nothing() -> None:
    return None


def _whole_llama(case: Llama) -> Prepared:
    """The untouched model in the first process; the second waits."""
    if distributed.get_rank() > 0:
        return Prepared(_nothing, _nothing)
    model, batch, said = case.model(), case.batch(), {}

    def run() -> None:
        clear(model)
        loss = plain_loss(model, batch)
        loss.backward()
        said["loss"] = loss.detach()

    return Prepared(run, lambda: said | gradients(model), close=partial(clear, model))


def _half_llama(case: Llama) -> Prepared:
    """Half of the heads, of the intermediate width and of the vocabulary, on all tokens, and nothing travels."""
    half = {name: getattr(case, name) // RANKS for name in ("heads", "kv_heads", "intermediate", "vocabulary")}
    model, batch = replace(case, **half).model(), case.batch()
    batch = replace(batch, tokens=batch.tokens % half["vocabulary"], labels=_halved(batch.labels, half["vocabulary"]))

    def run() -> None:
        clear(model)
        plain_loss(model, batch).backward()

    return Prepared(run, _nothing, close=partial(clear, model))


def _halved(labels: Tensor, vocabulary: int) -> Tensor:
    return torch.where(labels < 0, labels, labels % vocabulary)


def _our_llama(case: Llama, plan: str) -> Prepared:
    """seqloom on the untouched model."""
    fabric = _fabric(plan)
    model = parallelize(case.model(), fabric)
    local, shard = shard_batch(case.batch(), fabric)
    said = {}

    def run() -> None:
        clear(model)
        fabric.meter.reset()
        loss = token_loss(model, local, shard)
        loss.backward()
        sum_gradients(model, fabric)
        said["loss"] = loss.detach()

    def results() -> Results:
        loss = all_reduce_(said["loss"].clone(), fabric.world)
        return {"loss": loss} | whole_tensors(model, fabric, "gradient")

    return Prepared(run, results, lambda: sum(fabric.meter.sent.values()), fabric.close)


def _fabric(plan: str) -> Fabric:
    try:
        return Fabric.build(Plan.parse(plan), "cpu")
    except SeqloomError as error:
        raise Unavailable(str(error)) from error


def _whole_mlp(case: Mlp) -> Prepared:
    """The plain module in the first process; the second waits."""
    if distributed.get_rank() > 0:
        return Prepared(_nothing, _nothing)
    return local_mlp(case.module(), case.tensors(), lambda found: found)


def _half_mlp(case: Mlp) -> Prepared:
    """Half of the inner width on all tokens, and nothing travels."""
    narrow = replace(case, inner=case.inner // RANKS)
    return local_mlp(narrow.module(), narrow.tensors(), lambda found: None)


def local_mlp(
    module: nn.Module,
    given: Mapping[str, Tensor],
    finished: Callable[[dict[str, Tensor]], Results | None],
    forward: Callable[[Tensor], Tensor] | None = None,
    after: Callable[[], None] = lambda: None,
    sent: Callable[[], int] | None = None,
    close: Callable[[], None] = lambda: None,
) -> Prepared:
    """A run of a module on this rank's x and gradient of the output.

    finished: makes whole results of this rank's. forward: the module itself by default. after: what is left to do
    with gradients.
    """
    x, dout = given["x"].clone().requires_grad_(), given["dout"]
    said: dict[str, Tensor] = {}

    def run() -> None:
        clear(module)
        x.grad = None
        out = (forward or module)(x)
        out.backward(dout)
        after()
        said["out"] = out.detach()

    def results() -> Results | None:
        return finished({"out": said["out"], "x": x.grad} | gradients(module))

    return Prepared(run, results, sent, close)


class OurMlp(nn.Module):
    """seqloom's linears by themselves, as they stand in a split model."""

    def __init__(self, group: TensorGroup, given: Mapping[str, Tensor]) -> None:
        """given: the whole weights, as `Mlp.tensors` names them."""
        super().__init__()
        for name, direction in (("up", "colwise"), ("down", "rowwise")):
            moves = group.grid.linear(direction)
            weights = (given[f"{name}.weight"], given[f"{name}.bias"])
            setattr(self, name, ParallelLinear(group, moves, *weights, direction=direction))

    def forward(self, x: Tensor) -> Tensor:
        """[1, tokens here, width] to the same."""
        return self.down(gelu(self.up(x)))


def _our_mlp(case: Mlp, plan: str) -> Prepared:
    fabric = _fabric(plan)
    given, axis = case.tensors(), fabric.tensor
    module = OurMlp(TensorGroup.of(fabric), given)
    if fabric.plan.sequence_parallel:
        given |= {name: scatter_to_sequence_parallel_region(given[name], axis) for name in ("x", "dout")}

    def finished(found: dict[str, Tensor]) -> Results:
        made = whole_tensors(module, fabric, "gradient")
        for name in ("out", "x"):
            made[name] = _joined(found[name], fabric)
        return made

    return local_mlp(
        module,
        given,
        finished,
        after=lambda: (sum_gradients(module, fabric), None)[1],
        sent=lambda: sum(fabric.meter.sent.values()),
        close=fabric.close,
    )
