"""A transformers model from a configuration, with random weights or those of a folder."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from seqloom.errors import ModelError


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing its bars: every process would draw one for a single file."""
    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def weights_folder(source: str | None) -> Path | None:
    """`source` if it is a folder that holds a model's weights, or None."""
    folder = Path(source) if source else None
    if folder is None or not folder.is_dir():
        return None
    return folder if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")) else None


def outline(settings: Mapping[str, Any]) -> PreTrainedModel:
    """The causal language model of a Hugging Face configuration, of shapes alone: on the meta device, without weights.

    Raises ModelError where transformers cannot make it.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**settings, "dtype": "float32"}))
    except (StrictDataclassError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(f"transformers cannot build this model ({said}); correct its configuration.") from error


def build_model(
    settings: Mapping[str, Any], *, weights: Path | None = None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> PreTrainedModel:
    """The causal language model of a Hugging Face configuration, ready to train.

    weights: a folder to load them from; otherwise they are drawn from `seed`, alike on every rank.
    Raises ModelError where the weights do not fit the configuration.
    """
    config = AutoConfig.for_model(**{**settings, "dtype": "float32"})
    if weights is None:
        torch.manual_seed(seed)
        return _typed(AutoModelForCausalLM.from_config(config), dtype)
    try:
        with without_progress_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                weights,
                config=config,
                dtype=torch.promote_types(dtype, torch.float32),
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, in our words
            )
    except (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError) as error:
        raise ModelError(
            f"The weights in {weights} cannot be loaded ({' '.join(str(error).split())[:300]}); restore the folder, or "
            "name another."
        ) from error
    lacking = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if lacking:
        raise ModelError(
            f"The weights in {weights} do not fit the configuration: {lacking[0]} is missing or of another shape "
            f"({len(lacking)} in all); use the config.json that belongs to them."
        )
    return _typed(model, dtype)


def _typed(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in training, its weights in `dtype`."""
    if dtype == torch.float64 and hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # torch's grouped product, the default, has no float64
    wide = {name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in _float32(model)}
    model.to(dtype)
    for name, buffer in wide.items() if torch.finfo(dtype).bits < torch.finfo(torch.float32).bits else ():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, buffer)
    return model.train()


def _float32(model: PreTrainedModel) -> frozenset[str]:
    """Names of buffers that the family keeps in float32 whatever the weights are, as DeepSeek's biases of choice."""
    return frozenset(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
