"""Work on what strangers wrote (chat templates, patterns of tokenizers), done in a child process with limits.

A chat template is a program, and a tokenizer's pattern can take exponential time: neither may run where streams are
served. The compiler tries them before it writes an artifact and the server runs templates for every request, so both
import this package; it imports nothing of either. `worker` is the child's side, `process` the parent's; `templates` and
`encoding` are what the child does, loaded there by their files.
"""

from xllm_compiler.confined.process import Confined, Limits, Overrun, Refusal

__all__ = ["Confined", "Limits", "Overrun", "Refusal"]
