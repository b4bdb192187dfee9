"""What the runtime knows of the model it serves. Data only; the loader fills it from the manifest."""

from __future__ import annotations

from dataclasses import dataclass

from xllm_compiler.step.interface import STEP, Pooling


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Sizes are tokens unless said otherwise. The limits are those in force, which may be lower than the artifact's.

    `functions`: what requests may run. `pooling`, and `embedding_size`, numbers in an embedding: of an @embed.
    """

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
    functions: tuple[str, ...] = (STEP,)
    pooling: Pooling | None = None
    embedding_size: int = 0
