"""What the runtime knows of the model it serves. Data only; the loader fills it from the manifest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Sizes are tokens unless said otherwise. The limits are those in force, which may be lower than the artifact's."""

    name: str
    architecture: str
    artifact_id: str
    dtype: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_logits: int
    page_tokens: int
