"""The program that asks torch about itself, in a process that may crash or hang without harm."""

from __future__ import annotations

# Each answer is a line of JSON of its own, so that what was found before a crash is known.
PROBE = r"""
import importlib.util, json, sys

def say(**found):
    print(json.dumps(found), flush=True)

def describe(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

try:
    import torch
except BaseException as error:
    say(torch_error=describe(error))
    sys.exit(0)
say(torch=torch.__version__, cuda=torch.version.cuda, hip=getattr(torch.version, "hip", None))
try:
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            capability = torch.cuda.get_device_capability(index)
            bf16 = bool(torch.version.hip) or capability >= (8, 0)
            devices.append({"name": torch.cuda.get_device_name(index), "free": free, "total": total, "bf16": bf16})
    elif torch.version.cuda:
        torch.cuda.init()
    say(devices=devices)
except BaseException as error:
    say(cuda_error=describe(error))
if importlib.util.find_spec("flash_attn"):
    try:
        import flash_attn
        say(flash_attn=getattr(flash_attn, "__version__", "?"))
    except BaseException as error:
        say(flash_attn="error: " + describe(error))
if found := importlib.util.find_spec("bitsandbytes"):
    try:
        # Only what loads the native library: the package itself imports torch's compiler, three seconds.
        package = sys.modules["bitsandbytes"] = type(sys)("bitsandbytes")
        package.__path__ = list(found.submodule_search_locations)
        from bitsandbytes.cextension import lib
        kind = type(lib).__name__
        broken = "Mock" in kind or lib is None
        reason = getattr(lib, "error_msg", "") or getattr(lib, "formatted_error", "") or "no native library"
        say(bitsandbytes="error: " + describe(reason) if broken else ("CUDA" if "Cuda" in kind else "CPU"))
    except BaseException as error:
        say(bitsandbytes="error: " + describe(error))
"""
