"""Bundles from elsewhere: whatever they say, an error of one sentence, or the text of plain PyTorch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import mutations, toy
from tests.commands import Command
from tests.fakes import small_network
from tests.mutations import Changed
from trmt.averaging import average_bundles
from trmt.bundles import bundles, consistency
from trmt.bundles.bundles import load_bundle
from trmt.config import to_toml, to_tree
from trmt.decoding.beam import Beam
from trmt.decoding.engine import Engine, frozen
from trmt.decoding.request import Request
from trmt.errors import BundleError, ConfigError
from trmt.native import build, packed_weights, products
from trmt.native.addresses import OUT_OF_MEMORY, OUT_OF_RANGE, check_returned
from trmt.native.packed_weights import PackedWeightCache
from trmt.native.products import PackedProduct, PackedProducts
from trmt.native.transformer import NativeStepper
from trmt.nets.base import Decoding
from trmt.nets.ragged import Source
from trmt.storage.files import checksum
from trmt.text.tokenizer import Tokenizer
from trmt.training.run import train
from trmt.translating import Translator

needs_kernels = pytest.mark.skipif(not products.best_processor(), reason="no C compiler here")
Change = Callable[[Changed], None]


@pytest.fixture
def tokenizer(toy_set: Path) -> Tokenizer:
    return Tokenizer.load(toy_set / "tokenizer")


def sound(tokenizer: Tokenizer, architecture: str = "transformer", **options: Any) -> Changed:
    """A sound bundle, to be changed."""
    sizes = {"source_vocabulary": 60, "target_vocabulary": 60, "tied": "target", **options}
    net = small_network(architecture, **sizes)
    manifest = bundles.make_manifest(net, architecture, tokenizer, longest={"source": 9, "target": 9})
    weights = {name: x for name, x in net.state_dict().items() if name not in manifest.tied}
    return Changed({"format": 3, **to_tree(manifest)}, weights, tokenizer)


def write(folder: Path, bundle: Changed) -> Path:
    """The bundle in files, whose checksum is right."""
    folder.mkdir()
    bundle.tokenizer.save(folder / "tokenizer")
    bundles.write_tensors(folder / "weights.safetensors", bundle.weights)
    changes = {
        "tokenizer": bundle.tokenizer.fingerprint,
        "weights": {"sha256": checksum(folder / "weights.safetensors")},
    }
    (folder / "manifest.json").write_text(json.dumps(bundle.manifest | changes))
    return folder


def rows(side: str, count: int) -> Change:
    """Fewer tokens on one side, in the manifest and in the weights."""

    def change(bundle: Changed) -> None:
        bundle.manifest["network"][f"{side}_vocabulary"] = count
        for name, x in bundle.weights.items():
            if len(x) == 60 and mutations.side_of(name) == side:
                bundle.weights[name] = x[:count].clone()

    return change


def pad_beyond(bundle: Changed) -> None:
    """A list of pieces that is longer than the matrix, whose last piece is the padding."""
    known = bundle.tokenizer.source.pieces(range(60))
    listed = [*known[4:], "<unk>", "</s>", *"abcdefgh", "<pad>"]
    bundle.tokenizer = Tokenizer(bundle.tokenizer.settings, bundle.tokenizer.models, [listed])
    bundle.manifest["special"] = {}


def option(**options: Any) -> Change:
    return lambda bundle: bundle.manifest["network"].update(options)


def field(name: str, **values: int | str) -> Change:
    return lambda bundle: bundle.manifest[name].update(values)


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda bundle: bundle.weights.update({name: change(bundle.weights[name])})


NORM, LAYER = "decoder.layers.0.cross_norm.weight", "decoder.layers.0.self_qkv.weight"
REFUSED: list[tuple[Change, str]] = [
    (rows("source", 4), "has 4 source tokens, its tokenizer has 60"),
    (rows("source", 59), "has 59 source tokens"),
    (rows("target", 4), "has 4 target tokens"),
    (pad_beyond, "has 60 source tokens, its tokenizer has 67"),
    (option(max_positions=1), "max_positions = 1, but a token"),
    (option(max_positions=20_000_000), "max_positions = 20,000,000, and no weights of that size"),
    (option(max_positions=10**30), "has an integer of more than 64 bits"),
    (option(encoder_layers=20_000), "has encoder_layers = 20,000, but with its"),
    (option(feed_forward=200_000), "but the network needs [200000, 16]"),
    (option(d_model=1 << 18), "has max_positions = 96, a table of 25,165,824 numbers"),
    (option(max_positions=1 << 18, d_model=1 << 18), "a table of 68,719,476,736 numbers"),
    (option(source_vocabulary=1 << 18, d_model=1 << 10), "has source_vocabulary = 262,144, a table of 268,"),
    (option(heads=3), "cannot be divided into heads"),
    (option(d_model=32), "the network needs"),
    (field("special", pad=99_999), "99999 for the id of pad, the tokenizer has 0"),
    (field("tied", **{NORM: "x"}), f"ties '{NORM}' to 'x', which is no tensor of weights.safetensors"),
    (field("tied", **{NORM: NORM}), f"ties '{NORM}' to '{NORM}', which is no tensor"),
    (field("longest", source=-1), "longest.source = -1"),
    (tensor(NORM, Tensor.long), "of type int64, but the network needs float32"),
    (tensor(NORM, lambda x: x.to(torch.complex64)), "of type complex64"),
    (tensor(LAYER, Tensor.bool), "of type bool"),
    (tensor(LAYER, lambda x: x[:-1].clone()), "but the network needs"),
    (tensor(NORM, lambda x: x * torch.nan), "scores are not numbers"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_does_not_fit_together_is_refused_in_one_sentence(
    change: Change, message: str, tokenizer: Tokenizer, tmp_path: Path, trmt: Command
) -> None:
    bundle = sound(tokenizer)
    change(bundle)
    folder = write(tmp_path / "bundle", bundle)
    code, out, err = trmt("translate", folder, "--device", "cpu", stdin=b"ka lomo ti\n")
    assert (code, out) == (1, b"") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("command", ["inspect", "verify", "quantize", "export", "average"])
def test_every_command_refuses_a_network_with_fewer_tokens_than_its_tokenizer(
    command: str, tokenizer: Tokenizer, tmp_path: Path, trmt: Command
) -> None:
    bundle = sound(tokenizer)
    rows("source", 30)(bundle)
    folder = write(tmp_path / "bundle", bundle)
    more = {"quantize": ["--output", tmp_path / "out"], "average": ["--output", tmp_path / "out"]}
    more["export"] = ["--to", "onnx", "--output", tmp_path / "out"]
    code, _, err = trmt(command, folder, *more.get(command, []))
    assert code == 1 and err.count("\n") == 1 and "has 30 source tokens" in err
    assert not (tmp_path / "out").exists()


def test_an_average_of_a_bundle_whose_tied_names_are_damaged_is_refused(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bundle = sound(tokenizer)
    bundle.manifest["tied"]["decoder.embedding.tokens.weight"] = ""
    with pytest.raises(BundleError, match=r"ties 'decoder\..*' to '', which is no tensor"):
        average_bundles([write(tmp_path / "bundle", bundle)], tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_are_taken_in_fp32(
    dtype: torch.dtype, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bundle = sound(tokenizer, d_model=16)
    for name in bundle.weights:
        bundle.weights[name] = bundle.weights[name].to(torch.bfloat16).float()
    expected = Translator.load(write(tmp_path / "fp32", bundle)).translate(["ka lomo ti"])
    bundle.weights[LAYER] = bundle.weights[LAYER].to(dtype)
    bundle.weights[NORM] = bundle.weights[NORM].to(dtype)
    folder = write(tmp_path / "other", bundle)
    assert all(x.dtype == torch.float32 for x in load_bundle(folder).net.state_dict().values())
    if dtype != torch.float16:  # which has fewer numbers
        assert Translator.load(folder).translate(["ka lomo ti"]) == expected


def write_raw(folder: Path, kind: str, numbers: bytes, count: int) -> None:
    """A file of weights with a byte before everything else, so that nothing is at an even address."""
    head = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    head["b"] = {"dtype": kind, "shape": [count], "data_offsets": [1, 1 + len(numbers)]}
    raw = json.dumps(head).encode()
    file = folder / "weights.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + b" " + numbers)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["weights"]["sha256"] = checksum(file)
    manifest["tied"] = {}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", ["F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "C64", "X"])
def test_a_file_of_weights_in_types_that_nobody_computes_with_is_refused(
    kind: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = write(tmp_path / "bundle", sound(tokenizer))
    write_raw(folder, kind, bytes(24), {"F4": 48, "F6_E2M3": 32, "C64": 3}.get(kind, 24))
    with pytest.raises(BundleError, match=r"which trmt does not read|cannot read|damaged"):
        bundles.read_weights(folder, bundles.read_manifest(folder))


def test_numbers_at_odd_addresses_are_copied(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle", sound(tokenizer))
    expected = torch.randn(6)
    write_raw(folder, "F32", expected.numpy().tobytes(), 6)
    found = bundles.read_weights(folder, bundles.read_manifest(folder))["b"]
    assert torch.equal(found, expected) and found.data_ptr() % 4 == 0


def test_averaging_refuses_checkpoints_with_other_shapes(tokenizer: Tokenizer, tmp_path: Path) -> None:
    bundle = sound(tokenizer)
    one = write(tmp_path / "one", bundle)
    bundle.weights[LAYER] = bundle.weights[LAYER].t().contiguous()
    with pytest.raises(BundleError, match="differ in weights"):
        average_bundles([one, write(tmp_path / "other", bundle)], tmp_path / "out")


def test_a_recipe_with_fewer_tokens_than_the_tokenizer_is_refused(toy_set: Path, tmp_path: Path) -> None:
    options = toy.options(tmp_path / "run", toy_set, toy.recipe(tmp_path), "network.source_vocabulary=4")
    with pytest.raises(ConfigError, match="source_vocabulary = 4 is less than the 60 pieces"):
        train(options)


@pytest.mark.parametrize("suffix", ["", ":encoder"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"encoder_layers": 20_000},
        {"max_positions": 1 << 18, "d_model": 1 << 14},
        {"feed_forward": 1 << 17, "d_model": 1 << 17},
    ],
)
def test_training_starts_from_no_bundle_with_sizes_that_its_weights_have_not(
    sizes: dict[str, int], suffix: str, tokenizer: Tokenizer, toy_set: Path, tmp_path: Path
) -> None:
    bundle = sound(tokenizer)
    option(**sizes)(bundle)
    folder = write(tmp_path / "bundle", bundle)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(toy.BASE))
    options = toy.options(tmp_path / "run", toy_set, str(recipe), init_from=Path(f"{folder}{suffix}"))
    with pytest.raises(BundleError, match=r"is the limit|the network needs|does not fit"):
        train(options)


class Silent:
    """The config of a network from outside trmt that does not say how many tokens it knows."""

    max_positions, heads, decoder_layers, head_dim = 96, 2, 2, 8


def test_a_network_that_does_not_say_its_tokens_has_to_take_the_highest_ids(tokenizer: Tokenizer) -> None:
    for count in (60, 30):
        net = small_network("transformer", source_vocabulary=count, target_vocabulary=60, tied="target")
        net.config = Silent()
        if count == 60:
            consistency.check_network(net, tokenizer, where="here")
            continue
        with pytest.raises(BundleError, match="cannot take the highest ids"):
            consistency.check_network(net, tokenizer, where="here")


# Kernels


def native(architecture: str = "transformer") -> NativeStepper:
    stepper = frozen(small_network(architecture, source_vocabulary=300, target_vocabulary=300))
    assert isinstance(stepper, NativeStepper)
    return stepper


@needs_kernels
@pytest.mark.parametrize("architecture", ["transformer", "ssru"])
@pytest.mark.parametrize("token", [-1, 300, 2**40])
def test_kernels_refuse_ids_without_a_row(architecture: str, token: int) -> None:
    stepper = native(architecture)
    with pytest.raises(BundleError, match="beyond what the network has rows for"):
        stepper.start(Source.of([[5, 3], [7, token, 3]]), Decoding(2, 9))
    for step in range(3):
        state = stepper.start(Source.of([[5, 3]]), Decoding(2, 9))
        for _ in range(step):
            _, state = stepper.step(torch.tensor([[[5], [6]]]), state)
        with pytest.raises(BundleError, match="beyond what the network has rows for"):
            stepper.step(torch.tensor([[[5], [token]]]), state)


@needs_kernels
@pytest.mark.parametrize("architecture", ["transformer", "ssru"])
def test_kernels_refuse_positions_without_a_row(architecture: str) -> None:
    stepper = native(architecture)
    state = stepper.start(Source.of([[5, 3]]), Decoding(1, 96))
    for _ in range(96):
        _, state = stepper.step(torch.tensor([[[5]]]), state)
    with pytest.raises(BundleError, match="beyond what the network has rows for"):
        stepper.step(torch.tensor([[[5]]]), state)


@needs_kernels
@pytest.mark.parametrize("parents", [[[0, 2]], [[-1, 0]], [[0, 2**33]]])
@pytest.mark.parametrize("architecture", ["transformer", "ssru"])
def test_kernels_refuse_parents_that_are_no_hypotheses(architecture: str, parents: list[list[int]]) -> None:
    stepper = native(architecture)
    _, state = stepper.step(torch.tensor([[[5], [6]]]), stepper.start(Source.of([[5, 3]]), Decoding(2, 9)))
    with pytest.raises(BundleError, match="beyond what"):
        state.reorder(torch.tensor(parents))


@needs_kernels
@pytest.mark.parametrize(
    "wrong", [{"bos": 300}, {"eos": 300}, {"eos": -1}, {"banned": (1, 300)}, {"banned": (-5, 7)}]
)
def test_kernels_refuse_special_ids_without_a_row(wrong: dict[str, Any]) -> None:
    net = small_network("transformer", source_vocabulary=300, target_vocabulary=300)
    engine = Engine(net, Beam(size=2), **{"bos": 2, "eos": 3, **wrong})
    with pytest.raises(BundleError, match="beyond what"):
        list(engine.translate([Request((5, 3), 8)]))


@needs_kernels
def test_kernels_refuse_a_prefix_without_a_row() -> None:
    net = small_network("transformer", source_vocabulary=300, target_vocabulary=300)
    engine = Engine(net, Beam(size=2), bos=2, eos=3)
    with pytest.raises(BundleError, match="beyond what"):
        list(engine.translate([Request((5, 3), 8, prefix=(7, 300))]))


@needs_kernels
def test_products_refuse_inputs_of_another_width_or_type() -> None:
    product = PackedProduct(torch.randn(20, 16), torch.randn(20), precision="fp32")
    for x in (torch.randn(3, 17), torch.randn(3, 32), torch.randn(3, 16).double(), torch.randn(3, 16).half()):
        with pytest.raises(BundleError, match="or a layer its input"):
            product(x)
    for weight, bias in ((torch.randn(20, 16).half(), None), (torch.randn(20, 16), torch.randn(3))):
        with pytest.raises(BundleError):
            PackedProduct(weight, bias, precision="fp32")


@needs_kernels
def test_a_product_that_is_too_long_for_int8_is_refused() -> None:
    with pytest.raises(ConfigError, match="65,537 columns"):
        PackedProduct(torch.randn(1, 65_537), None, precision="int8")


@needs_kernels
def test_packed_weights_of_another_size_are_packed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_weights, "WORTH", 0)
    monkeypatch.setattr(build, "cache_folder", lambda: tmp_path)
    weight, x = torch.randn(70, 33), torch.randn(5, 33)
    expected = PackedProducts("fp32")(weight, None)(x)
    path = PackedWeightCache.of("a", "fp32").path
    known = packed_weights._known_by(weight)
    for parts in ((torch.zeros(16), None, None), (torch.zeros(80 * 33, dtype=torch.int8), None, None)):
        packed_weights._write(path, [(known, parts)])
        assert torch.equal(PackedProducts("fp32", checksum="a")(weight, None)(x), expected)


@needs_kernels
def test_a_gate_that_is_not_a_number_shows() -> None:
    net = small_network("ssru")
    with torch.no_grad():
        net.get_parameter("decoder.layers.0.ssru.bias")[3] = torch.nan
    stepper = frozen(net)
    hidden, _ = stepper.step(torch.tensor([[[5]]]), stepper.start(Source.of([[5, 3]]), Decoding(1, 9)))
    assert hidden.isnan().any()


def test_kernels_without_memory_raise_what_makes_batches_smaller() -> None:
    check_returned(0)
    for code in (OUT_OF_RANGE, OUT_OF_RANGE | OUT_OF_MEMORY):
        with pytest.raises(BundleError):
            check_returned(code)
    with pytest.raises(MemoryError):
        check_returned(OUT_OF_MEMORY)


# Many of them


def test_a_hundred_changed_bundles(toy_set: Path, tmp_path: Path) -> None:
    problems, outcomes = mutations.run(tmp_path / "changed", toy_set, range(100), seed=1, trained=4)
    assert not problems
    assert min(outcomes["refused"], outcomes["translated"], outcomes["trained"]) >= 5


def library_of(compiler: str, name: str) -> str:
    asked = [compiler, f"-print-file-name={name}"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@needs_kernels
@pytest.mark.parametrize("seed", ["1", "2"])
def test_five_thousand_changed_bundles_under_sanitizers(toy_set: Path, tmp_path: Path, seed: str) -> None:
    """Kernels that were compiled with sanitizers end the process at the first undefined behaviour."""
    compiler = shutil.which("gcc") or pytest.skip("no gcc here")
    libraries = [library_of(compiler, name) for name in ("libasan.so", "libstdc++.so.6")]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("this gcc has no sanitizers")
    wrapper = tmp_path / "cc"
    flags = "-g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" {flags}\n')
    wrapper.chmod(0o755)
    shutil.copytree(toy_set, tmp_path / "set")
    settings = {
        "CC": str(wrapper),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "LD_PRELOAD": " ".join(libraries),
        # Python leaks; shadow memory is not given back to the system at each large free, which takes time.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:clear_shadow_mmap_threshold=1073741824",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-m", "tests.mutations", str(tmp_path), "5000", seed]
    done = subprocess.run(
        command, env={**os.environ, **settings}, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "5000 bundles" in done.stdout
    for kernels in ("inference", "search", "training"):
        assert list((tmp_path / "cache/trmt").glob(f"{kernels}-*.so"))
