"""LoRA (Hu et al. 2022): the encoder is frozen, and adapters of low rank beside its linear layers are trained."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from syntriever.run import terminal

if TYPE_CHECKING:
    from peft import PeftModel


def add(model: Any, rank: int, seed: int) -> PeftModel:
    """Freeze `model` and put adapters beside all linear layers of its transformer, in place: W x becomes W x + 2 B A x.

    B is 0, so no embedding changes before the first step. Of what is returned, `merge_and_unload()` puts plain weights
    back into `model`.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # A is random, and the same in every process
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with warnings.catch_warnings(action="ignore"):  # of one library to the other
        adapters = get_peft_model(model[0].auto_model, config)
    trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad == wanted) for wanted in (True, False))
    terminal.say(f"note:  --lora {rank} trains {trained:,} weights of adapters beside {frozen:,} frozen ones")
    return adapters
