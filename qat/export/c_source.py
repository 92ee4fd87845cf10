"""A .tflite file as C++ source, for devices without a file system."""

from __future__ import annotations

import pathlib
import re

from qat.export.graph import ExportError, Graph

_BYTES_A_LINE = 20
_HEADER = """\
// {file} for tflite-micro, written by qat. Its operators:
//   tflite::MicroMutableOpResolver<{count}> resolver;
{operators}
#pragma once

#include <cstddef>

alignas(16) extern const unsigned char {name}_tflite[];
constexpr std::size_t {name}_tflite_size = {size};
// What tflite-micro's reference kernels took on a 64-bit machine; kernels made for a processor may
// ask for more.
constexpr std::size_t {name}_arena_size = {arena};
"""
_SOURCE = """\
// {file} for tflite-micro, written by qat.
#include "{header}"

alignas(16) constexpr unsigned char {name}_tflite[{name}_tflite_size] = {{
{lines}
}};
"""


def c_sources(
    path: pathlib.Path, content: bytes, graph: Graph, arena: int
) -> dict[pathlib.Path, bytes]:
    """{path: content} of the .cc and .h that stand beside a .tflite file.

    Args:
        path: of the .tflite file; its stem names the constants.
        content: its bytes.
        graph: its operators.
        arena: bytes of memory that it needs.

    Raises:
        ExportError: the .tflite file has the name of one of them.
    """
    source, header = path.with_suffix(".cc"), path.with_suffix(".h")
    if path in (source, header):
        raise ExportError(f"{path} is written beside the file; give it a name ending in .tflite")
    name = re.sub(r"\W", "_", path.stem, flags=re.ASCII)
    name = f"_{name}" if name[0].isdigit() else name
    operators = sorted({operator.name for operator in graph.operators})
    lines = [
        "  " + ", ".join(map(str, content[start : start + _BYTES_A_LINE])) + ","
        for start in range(0, len(content), _BYTES_A_LINE)
    ]
    values = {
        "file": path.name,
        "header": header.name,
        "name": name,
        "count": len(operators),
        "operators": "\n".join(f"//   resolver.{_method(operator)}();" for operator in operators),
        "size": len(content),
        "arena": arena,
        "lines": "\n".join(lines),
    }
    return {
        source: _SOURCE.format(**values).encode(),
        header: _HEADER.format(**values).encode(),
    }


def _method(operator: str) -> str:
    """DEPTHWISE_CONV_2D → AddDepthwiseConv2D."""
    parts = operator.split("_")
    return "Add" + "".join(part if part[0].isdigit() else part.capitalize() for part in parts)
