"""All op classes, by family. Importing this package registers every op; families must not import passes or interp.

What a family module defines is exported here as it stands, so that an op is named in one place.
"""

from xllm_compiler.ir.ops.comm import *
from xllm_compiler.ir.ops.elementwise import *
from xllm_compiler.ir.ops.kv import *
from xllm_compiler.ir.ops.nn import *
from xllm_compiler.ir.ops.param import *
from xllm_compiler.ir.ops.quant import *
from xllm_compiler.ir.ops.sched import *
from xllm_compiler.ir.ops.state import *
from xllm_compiler.ir.ops.tensor import *
from xllm_compiler.ir.ops.unary import *
