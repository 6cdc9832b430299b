"""ONNX graphs written node by node: values are names, and an operation returns the name of its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from trmt.interop.base import import_package

OPSET, IR_VERSION = 17, 8  # old enough for programs of the last years
MAX_BYTES = 2**31 - 2**26  # of the weights in one file; protocol buffers end at 2 GiB


class OnnxGraph:
    """A graph that grows; a branch of it shares the constants of its root."""

    def __init__(self, root: OnnxGraph | None = None) -> None:
        self.root = root or self
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._values = 0

    def new_name(self) -> str:
        """A name that no value has yet."""
        self.root._values += 1
        return f"value_{self.root._values}"

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        """Declare an input of the graph; an axis with a name may have any length."""
        self.inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        """Make a value an output of the graph."""
        self.nodes.append(import_package("onnx.helper").make_node("Identity", [value], [name]))
        self.outputs.append(_value_info(name, dtype, shape))

    def weight(self, name: str, tensor: Tensor) -> str:
        """A tensor as a constant; under a name that was given before, the earlier one."""
        return self._constant(name, tensor.detach().float().cpu().numpy())

    def scalar(self, value: float) -> str:
        """A float as a constant."""
        return self._constant(f"number_{value}", np.float32(value))

    def int_list(self, *values: int) -> str:
        """Integers as a constant with one axis."""
        return self._constant("integers_" + "_".join(map(str, values)), np.array(values, np.int64))

    def int_scalar(self, value: int) -> str:
        """An integer as a constant without axes."""
        return self._constant(f"integer_{value}", np.array(value, np.int64))

    def _constant(self, name: str, array: Any) -> str:
        if name not in self.root.constants:
            array = np.asarray(array, order="C")
            self.root.constants[name] = import_package("onnx.numpy_helper").from_array(array, name)
        return name

    def op(self, operation: str, *values: str, **attributes: Any) -> str:
        """Add an operation and return its only result."""
        return self.multi_op(operation, 1, *values, **attributes)[0]

    def multi_op(self, operation: str, count: int, *values: str, **attributes: Any) -> list[str]:
        """Add an operation and return its `count` results."""
        results = [self.new_name() for _ in range(count)]
        node = import_package("onnx.helper").make_node(operation, list(values), results, **attributes)
        self.nodes.append(node)
        return results

    def as_branch(self, results: Sequence[str]) -> Any:
        """This graph as a branch of an `If`, with these results."""
        helper, proto = import_package("onnx.helper"), import_package("onnx").TensorProto
        outputs = [helper.make_tensor_value_info(result, proto.FLOAT, None) for result in results]
        return helper.make_graph(self.nodes, self.new_name(), [], outputs)

    def save(self, path: Path) -> None:
        """Write the graph and check it; weights that are too large for one file go into another beside it."""
        onnx = import_package("onnx")
        constants = list(self.constants.values())
        graph = onnx.helper.make_graph(self.nodes, path.stem, self.inputs, self.outputs, constants)
        opset = [onnx.helper.make_opsetid("", OPSET)]
        model = onnx.helper.make_model(
            graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="trmt"
        )
        large = sum(len(constant.raw_data) for constant in constants) > MAX_BYTES
        external = {"save_as_external_data": True, "location": f"{path.name}_data"} if large else {}
        onnx.save(model, str(path), **external)
        onnx.checker.check_model(str(path), full_check=True)


def _value_info(name: str, dtype: str, shape: Sequence[int | str]) -> Any:
    number = getattr(import_package("onnx").TensorProto, dtype)
    return import_package("onnx.helper").make_tensor_value_info(name, number, list(shape))
