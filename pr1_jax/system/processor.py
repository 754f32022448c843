"""The processor of this machine."""

import pathlib
import platform


def describe() -> tuple[str, str]:
    """The processor's name, and what instructions it has, apart by spaces.

    Compilers make other code for another one, which rounds otherwise.
    """
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor(), ""
    facts = {k.strip(): v.strip() for k, _, v in (x.partition(":") for x in lines)}
    return facts.get("model name", ""), facts.get("flags", facts.get("Features", ""))
