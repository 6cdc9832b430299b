"""ONNX graphs written node by node: values are names, and every operation returns that of its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from trmt.interop.base import package

OPSET, IR_VERSION = 17, 8  # what programs of the last years can read
LARGEST = 2**31 - 2**26  # bytes of weights that fit into one file; protocol buffers end at 2 GiB


class Graph:
    """A graph that grows; a branch of it sees the constants of the whole."""

    def __init__(self, whole: Graph | None = None) -> None:
        self.whole = whole or self
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._values = 0

    def name(self) -> str:
        """A name that no value has yet."""
        self.whole._values += 1
        return f"value_{self.whole._values}"

    def input(self, name: str, kind: str, shape: Sequence[int | str]) -> str:
        """Declare an input of the graph; an axis with a name may have any length."""
        self.inputs.append(_declared(name, kind, shape))
        return name

    def output(self, value: str, name: str, kind: str, shape: Sequence[int | str]) -> None:
        """Make a value an output of the graph."""
        self.nodes.append(package("onnx.helper").make_node("Identity", [value], [name]))
        self.outputs.append(_declared(name, kind, shape))

    def weight(self, name: str, tensor: Tensor) -> str:
        """A constant with a name of its own; asked for again, it is the same."""
        if name not in self.whole.constants:
            array = np.ascontiguousarray(tensor.detach().float().cpu().numpy())
            self.whole.constants[name] = package("onnx.numpy_helper").from_array(array, name)
        return name

    def number(self, value: float) -> str:
        """A number as a constant."""
        return self._constant(np.float32(value), f"number_{value}")

    def integers(self, *values: int) -> str:
        """Whole numbers as a constant list."""
        return self._constant(np.array(values, np.int64), "integers_" + "_".join(map(str, values)))

    def integer(self, value: int) -> str:
        """A whole number as a constant without axes."""
        return self._constant(np.array(value, np.int64), f"integer_{value}")

    def _constant(self, array: Any, name: str) -> str:
        if name not in self.whole.constants:
            self.whole.constants[name] = package("onnx.numpy_helper").from_array(np.asarray(array), name)
        return name

    def do(self, operation: str, *values: str, **attributes: Any) -> str:
        """The result of an operation that has one."""
        return self.many(operation, 1, *values, **attributes)[0]

    def many(self, operation: str, count: int, *values: str, **attributes: Any) -> list[str]:
        """The results of an operation that has so many."""
        results = [self.name() for _ in range(count)]
        self.nodes.append(package("onnx.helper").make_node(operation, list(values), results, **attributes))
        return results

    def branch(self, results: Sequence[str]) -> Any:
        """This graph as one way that `If` can go."""
        helper, proto = package("onnx.helper"), package("onnx").TensorProto
        outputs = [helper.make_tensor_value_info(result, proto.FLOAT, None) for result in results]
        return helper.make_graph(self.nodes, self.name(), [], outputs)

    def save(self, path: Path) -> None:
        """Write the graph, checked; large ones keep their weights in a file beside it."""
        onnx = package("onnx")
        constants = list(self.constants.values())
        graph = onnx.helper.make_graph(self.nodes, path.stem, self.inputs, self.outputs, constants)
        opset = [onnx.helper.make_opsetid("", OPSET)]
        model = onnx.helper.make_model(
            graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="trmt"
        )
        large = sum(len(constant.raw_data) for constant in constants) > LARGEST
        beside = {"save_as_external_data": True, "location": f"{path.name}_data"} if large else {}
        onnx.save(model, str(path), **beside)
        onnx.checker.check_model(str(path), full_check=True)


def _declared(name: str, kind: str, shape: Sequence[int | str]) -> Any:
    number = getattr(package("onnx").TensorProto, kind)
    return package("onnx.helper").make_tensor_value_info(name, number, list(shape))
