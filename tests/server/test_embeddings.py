"""/v1/embeddings by the real `openai` client, of a server process that answers chats from the same artifact."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModel

from xllm_compiler.driver import compile_checkpoint
from xllm_compiler.models.embedding_checkpoint import write_embedding_checkpoint
from xllm_compiler.models.random_checkpoint import TINY
from xllm_compiler.options import CompileOptions

TEXTS = ["def add(a, b):", "naïve café", "x" * 300, " "]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    settings = {**TINY, "is_matryoshka": True}
    return write_embedding_checkpoint("llama", path / "tiny", "lasttoken", head=True, settings=settings, seed=6)


@pytest.fixture(scope="module")
def both(checkpoint: Path, start_server: Any) -> Any:
    """It has a head, so it answers chats too."""
    artifact = checkpoint.parent / "both"
    compile_checkpoint(checkpoint, artifact, CompileOptions(name="both", max_num_seqs=8, max_num_batched_tokens=64))
    return start_server(artifact, "--threads", "1", "--max-waiting-requests", "40").wait_ready()


@pytest.fixture
def client(both: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=both.url + "/v1", api_key="none", max_retries=0, timeout=60)


def post(server: Any, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + "/v1/embeddings", json=fields, timeout=60)


def test_texts_ids_and_both_encodings(client: openai.OpenAI, both: Any, checkpoint: Path) -> None:
    answer = client.embeddings.create(model="both", input=TEXTS)  # asks for base64
    assert [item.index for item in answer.data] == [0, 1, 2, 3] and answer.model == "both"
    ids = [httpx.post(both.url + "/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
    vectors = [item.embedding for item in answer.data]
    numbers = client.embeddings.create(model="both", input=TEXTS, encoding_format="float")
    assert [item.embedding for item in numbers.data] == vectors
    assert [item.embedding for item in client.embeddings.create(model="both", input=ids).data] == vectors
    assert client.embeddings.create(model="both", input=ids[0]).data[0].embedding == vectors[0]
    assert client.embeddings.create(model="both", input=TEXTS[1]).data[0].embedding == vectors[1]
    model = AutoModel.from_pretrained(checkpoint, dtype=torch.float32)
    for given, vector in zip(ids, vectors, strict=True):
        with torch.no_grad():
            want = model(torch.tensor([given])).last_hidden_state[0, -1].numpy()
        np.testing.assert_allclose(vector, want / np.linalg.norm(want), atol=2e-6)


def test_chats_and_embeddings_at_once(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "both", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}

    def chat() -> str:
        answer = client.chat.completions.create(**ask, max_completion_tokens=40, extra_body={"ignore_eos": True})
        return answer.choices[0].message.content or ""

    def embed() -> list[list[float]]:
        return [item.embedding for item in client.embeddings.create(model="both", input=TEXTS).data]

    text, vectors = chat(), embed()
    with ThreadPoolExecutor(12) as pool:
        chats = [pool.submit(chat) for _ in range(6)]
        embeds = [pool.submit(embed) for _ in range(6)]
        assert {job.result() for job in chats} == {text}
        assert all(job.result() == vectors for job in embeds)


def test_dimensions(client: openai.OpenAI) -> None:
    whole = np.array(client.embeddings.create(model="both", input="a b c").data[0].embedding)
    short = np.array(client.embeddings.create(model="both", input="a b c", dimensions=10).data[0].embedding)
    np.testing.assert_allclose(short, whole[:10] / np.linalg.norm(whole[:10]), rtol=1e-5)


def test_base64_is_the_bytes_of_floats(both: Any) -> None:
    found = post(both, input="a", encoding_format="base64").json()["data"][0]
    vector = np.frombuffer(base64.b64decode(found["embedding"]), "<f4")
    assert vector.tolist() == post(both, input="a").json()["data"][0]["embedding"] and len(vector) == 64


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({}, "input", "`input` is required"),
        ({"input": []}, "input", "must not be empty"),
        ({"input": ""}, "input", "at least one token"),
        ({"input": ["a", ""]}, "input", "at least one token"),
        ({"input": [[]]}, "input", "at least one token"),
        ({"input": [1, "a"]}, "input", "expected"),
        ({"input": {"text": "a"}}, "input", "expected"),
        ({"input": None}, "input", "expected"),
        ({"input": [384]}, "input", "not within the vocabulary"),
        ({"input": [-1]}, "input", "not within the vocabulary"),
        ({"input": [5] * 513}, "input", "maximum context length is 512"),
        ({"input": ["a"] * 200}, "input", "more than this server takes at once"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float or base64"),
        ({"input": "a", "dimensions": 0}, "dimensions", "from 1 to 64"),
        ({"input": "a", "dimensions": 65}, "dimensions", "from 1 to 64"),
        ({"input": "a", "dimensions": 2**70}, "dimensions", ""),
        ({"input": "a", "dimensions": "8"}, "dimensions", "expected"),
        ({"input": "a", "max_tokens": 3}, "max_tokens", "unknown field"),
        ({"input": "a", "model": "other"}, "model", "does not exist"),
    ],
)
def test_bad_input(both: Any, fields: dict[str, Any], param: str, said: str) -> None:
    answer = post(both, **fields)
    assert answer.status_code == (404 if "model" in fields else 400)
    error = answer.json()["error"]
    assert error["param"] == param and said in error["message"] and error["type"].endswith("_error")


def test_a_chat_model_makes_no_embeddings(fake: Any) -> None:
    answer = fake.post("/v1/embeddings", input="a")
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "model_not_supported"
    assert "makes no embeddings: it answers chats" in answer.json()["error"]["message"]


def test_what_answers_hold_is_counted_and_given_back(make: Any) -> None:
    served = make(embeds=True)
    held = served.ctx.engine_client.held
    whole = served.post("/v1/embeddings", input=["ab", "cd"] * 6)
    assert whole.status_code == 200 and len(whole.json()["data"]) == 12 and held.used == 0
    held.limit = 60_000  # a vector of 260 numbers may take 17 KiB on its way
    assert served.post("/v1/embeddings", input=["ab"] * 2).status_code == 200
    full = served.post("/v1/embeddings", input=["ab"] * 12)
    assert full.status_code == 429 and full.json()["error"]["code"] == "server_overloaded"
    assert held.used == 0 and served.ctx.engine_client.open == 0


def test_a_failure_is_one_error(make: Any) -> None:
    served = make(embeds=True)
    served.executor.fail = True
    answer = served.post("/v1/embeddings", input=["ab", "cd"])
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
    assert served.ctx.engine_client.held.used == 0


def test_an_embedding_model_does_not_chat(checkpoint: Path, start_server: Any) -> None:
    artifact = checkpoint.parent / "alone"
    options = CompileOptions(name="alone", functions=("embed",), max_num_seqs=8, max_num_batched_tokens=64)
    compile_checkpoint(checkpoint, artifact, options)
    server = start_server(artifact, "--threads", "1").wait_ready()
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60)
    assert len(client.embeddings.create(model="alone", input="a").data[0].embedding) == 64
    with pytest.raises(openai.BadRequestError, match="generates no text: it makes embeddings, at /v1/embeddings"):
        client.chat.completions.create(model="alone", messages=[{"role": "user", "content": "hi"}])
    with pytest.raises(openai.BadRequestError, match="generates no text"):
        client.completions.create(model="alone", prompt="hi")
