"""The switches of a front door: memory, adapters and learned words, under the names that notebooks use."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sfumato.models.layers import Attention
from sfumato.pipelines.adapted import Adapted, located
from sfumato.pipelines.opening import passed_over
from sfumato.pipelines.pipeline import Pipeline
from sfumato.weights.adapters import read_embedding
from sfumato.weights.adapters.inversion import embedding_of

TEXTS, TOKENIZERS = ("text_encoder", "text_encoder_2"), ("tokenizer", "tokenizer_2")
ADAPTER_OPTIONS = (
    *("low_cpu_mem_usage", "use_safetensors", "local_files_only", "token", "force_download", "proxies", "hotswap"),
    *("prefix", "network_alphas"),
)

log = logging.getLogger(__name__)


class Switches:
    """What can be switched on a door, whose networks these are."""

    vae: Any
    _adapted: Adapted
    _pipe: Pipeline

    # Memory ---------------------------------------------------------------------------------------

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Compute the heads of attention in slices: half of them at a time ("auto"), one ("max"), or so many."""
        if isinstance(slice_size, str) and slice_size not in ("auto", "max"):
            raise ValueError(f"slice_size = {slice_size!r}; give 'auto', 'max' or a number of heads")
        for module in self._pipe.denoiser.modules():
            if isinstance(module, Attention):
                auto = max(1, module.heads // 2) if slice_size == "auto" else 1
                module.sliced = auto if isinstance(slice_size, str) else slice_size

    def disable_attention_slicing(self) -> None:
        """Compute all heads at once again."""
        self.enable_attention_slicing(None)

    set_attention_slice = enable_attention_slicing

    def enable_vae_slicing(self) -> None:
        """Encode and decode one picture at a time."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Encode and decode all pictures of a call at once again."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Encode and decode in overlapping tiles of the size that the autoencoder was trained on."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encode and decode whole pictures again."""
        self.vae.disable_tiling()

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Have each network on the GPU, where there is one, only while it is at work; see `Pipeline.set_memory`."""
        self._spare("balanced", gpu_id, device)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Have each layer on the GPU, where there is one, only while it is called; see `Pipeline.set_memory`."""
        self._spare("low", gpu_id, device)

    def _spare(self, memory: str, gpu_id: int | None, device: torch.device | str | None) -> None:
        place = torch.device(device or ("cuda" if gpu_id is None else f"cuda:{gpu_id}"))
        self._pipe.set_memory("fast")
        if place.type != "cuda" or torch.cuda.is_available():
            self._pipe.to("cpu")
            self._pipe.runtime = replace(self._pipe.runtime, device=place)
        self._pipe.set_memory(memory)
        log.info("memory %s: weights are on %s while they are needed", memory, self._pipe.runtime.device)

    def enable_group_offload(self, *options: Any, **more: Any) -> None:
        """Nothing is offloaded here."""
        log.info("enable_group_offload is passed over; the networks stay on %s", self._pipe.denoiser.device)

    def enable_xformers_memory_efficient_attention(self, *options: Any, **more: Any) -> None:
        """Attention is PyTorch's own, which saves the same memory."""
        log.info("xformers is passed over: attention is PyTorch's own, which saves the same memory")

    disable_xformers_memory_efficient_attention = enable_xformers_memory_efficient_attention
    fuse_qkv_projections = unfuse_qkv_projections = enable_xformers_memory_efficient_attention

    def maybe_free_model_hooks(self) -> None:
        """Let go of weights that are kept for the stage that was at work last."""
        self._pipe.leave()

    def remove_all_hooks(self) -> None:
        """Have all weights there all the time again."""
        self._pipe.set_memory("fast")

    def reset_device_map(self) -> None:
        """Nothing is mapped to several devices here."""

    def enable_freeu(self, *options: float, **more: float) -> None:
        """ValueError: it changes pictures, and is not implemented."""
        raise ValueError("enable_freeu is not supported; leave it out")

    def disable_freeu(self) -> None:
        """It never acts."""

    # Adapters -------------------------------------------------------------------------------------

    def load_lora_weights(
        self,
        source: str | Path,
        adapter_name: str | None = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **others: Any,
    ) -> None:
        """Put on an adapter: a file, a folder, a name in the models folder or a hub id.

        It becomes the active one. adapter_name: for `set_adapters`; "default_0" and so on where None.
        """
        passed_over(others, "load_lora_weights", ADAPTER_OPTIONS)
        if isinstance(source, dict):
            raise ValueError("load_lora_weights takes a file or a folder here, no tensors; save them first")
        self._adapted.load(located("lora", source, weight_name, subfolder, revision, cache_dir), adapter_name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float | None] | None = None
    ) -> None:
        """Let these adapters be active, with these strengths (1 where None)."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        one = adapter_weights is None or isinstance(adapter_weights, int | float)
        strengths = [adapter_weights] * len(names) if one else list(adapter_weights)  # type: ignore[arg-type]
        if len(strengths) != len(names):
            raise ValueError(f"{len(strengths)} strengths for {len(names)} adapters; give one, or as many")
        if any(isinstance(strength, dict) for strength in strengths):
            raise ValueError("strengths for single blocks are not supported; give one number for each adapter")
        numbers = [1.0 if s is None else float(s) for s in strengths]  # type: ignore[arg-type]
        self._adapted.choose(dict(zip(names, numbers, strict=True)))

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that count."""
        return list(self._adapted.active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of the adapters that are loaded, by network."""
        names = list(self._adapted.loaded)
        return {"unet": names, "text_encoder": names} if names else {}

    def disable_lora(self) -> None:
        """Take off what is active for a while."""
        self._adapted.enabled = False
        self._adapted.wear()

    def enable_lora(self) -> None:
        """Put it on again."""
        self._adapted.enabled = True
        self._adapted.wear()

    def fuse_lora(
        self,
        components: Sequence[str] = (),
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Let adapters stay on whatever becomes active, and be saved with the model.

        components: passed over, as an adapter changes all networks that it was made for.
        """
        self._adapted.fuse(adapter_names, lora_scale)

    def unfuse_lora(self, **components: Any) -> None:
        """Take off what was fused."""
        self._adapted.unfuse()

    def unload_lora_weights(self, reset_to_overwritten_params: bool = False) -> None:
        """Forget all adapters; what is fused stays on."""
        self._adapted.unload()

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget some adapters."""
        self._adapted.delete([adapter_names] if isinstance(adapter_names, str) else adapter_names)

    def load_textual_inversion(
        self,
        source: str | Path | torch.Tensor | Mapping[str, Any] | Sequence[str | Path | torch.Tensor | Mapping[str, Any]],
        token: str | Sequence[str] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        **others: Any,
    ) -> None:
        """Know the learned word of a file, a folder, a name in the models folder or a hub id, of tensors, or several.

        token:        the word that stands for it in prompts; the file's own where None.
        text_encoder: the one that is to know it, where there are several; None: all, for a file that has the vectors
                      of each. tokenizer: that one's.
        """
        place = None if text_encoder is None and tokenizer is None else self._place(text_encoder, tokenizer)
        passed_over(others, "load_textual_inversion", ADAPTER_OPTIONS)
        sources = [source] if isinstance(source, str | Path | torch.Tensor | Mapping) else list(source)
        tokens = [token] * len(sources) if token is None or isinstance(token, str) else list(token)
        if len(tokens) != len(sources):
            raise ValueError(f"{len(tokens)} tokens for {len(sources)} learned words; give as many, or none")
        for found, name in zip(sources, tokens, strict=True):
            if isinstance(found, str | Path):
                word = read_embedding(learned(found, weight_name, subfolder, revision, cache_dir), name)
            else:
                word = embedding_of(found, name)
            self._adapted.learn(word, place)

    def _place(self, text_encoder: Any, tokenizer: Any) -> int:
        """The place of a text encoder, or of its tokenizer; ValueError for one that is not this model's."""
        names = [name for name in ("text_encoder", "text_encoder_2") if getattr(self._pipe, name) is not None]
        for place, (encoder, reader) in enumerate(zip(TEXTS, TOKENIZERS, strict=True)):
            same = text_encoder is getattr(self._pipe, encoder), tokenizer is getattr(self, reader)
            if same[0] if text_encoder is not None else same[1]:
                return place
        raise ValueError(
            f"text_encoder or tokenizer is none that learns words here; give this door's {' or '.join(names)}"
        )

    def unload_textual_inversion(
        self, tokens: str | Sequence[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> None:
        """Forget some learned words, or all, in all text encoders."""
        self._adapted.forget([tokens] if isinstance(tokens, str) else tokens)

    def load_ip_adapter(self, *source: Any, **options: Any) -> None:
        """ValueError: it is not implemented."""
        raise ValueError("load_ip_adapter is not supported; leave it out")


def learned(place: str | Path, name: str | None, subfolder: str | None, revision: str | None, cache: Any) -> Path:
    """The file of a learned word; in a folder, the one that training scripts write."""
    found = located("embedding", place, name, subfolder, revision, cache)
    names = ("learned_embeds.safetensors", "learned_embeds.bin")
    return next((found / name for name in names if (found / name).is_file()), found) if found.is_dir() else found
