"""Trains one system with one seed, tests it, and leaves what was found in result.json: a process of its own.

    python bench/claims/run.py WORK SYSTEM SEED --scale phrasebook

WORK holds the data that `data.prepare` made. Ended before its time, the run goes on from its checkpoint when
it is called again. Sentences are translated greedily and never cut: what a network does with sentences
longer than any in training is one of the questions.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from claims import data, texts
from claims.scale import SCALES, Scale
from claims.systems import BERT, BY_NAME, System, recipe
from experiment import write_lines
from provenance import provenance

RESULT = "result.json"
BATCH = 50  # sentences whose likelihood is computed together


def place_of(work: Path, system: str, seed: int) -> Path:
    """The folder of a run."""
    return work / f"seed-{seed}" / system


def run(work: Path, system: System, seed: int, scale: Scale, *, device: str) -> dict[str, Any]:
    """Train, translate, score."""
    place = place_of(work, system.name, seed)
    tree = recipe(system, scale, seed=seed, device=device)
    seconds = train(place, data.folder(work, seed), system, tree)
    result = {"system": system.name, "seed": seed, "commit": provenance()["commit"], "recipe": tree}
    result["training"] = learned(place, seconds)
    if system.family != "masked":
        began = time.monotonic()
        result |= tested(place, data.folder(work, seed), scale, device=device)
        result["test_seconds"] = round(time.monotonic() - began, 1)
    write_lines(place / RESULT, [json.dumps(result, ensure_ascii=False)])
    return result


def train(place: Path, prepared: Path, system: System, tree: dict[str, Any]) -> float:
    """Train to the end; the seconds that this call took."""
    from trmt.config import to_toml
    from trmt.training.planning import TrainOptions
    from trmt.training.run import train

    place.mkdir(parents=True, exist_ok=True)
    if system.start == "vectors":
        tree = {**tree, "vectors": {"source": str(data.vectors(prepared, tree["network"]["d_model"]))}}
    write_lines(place / "recipe.toml", [to_toml(tree)])
    began = time.monotonic()
    train(
        TrainOptions(
            run=place / "run",
            data=prepared / system.data,
            recipe=str(place / "recipe.toml"),
            init_from=Path(f"{place.parent / BERT / 'run'}:encoder") if system.start == "bert" else None,
            pretrain=system.family == "masked",
        )
    )
    return time.monotonic() - began


def learned(place: Path, seconds: float) -> dict[str, Any]:
    """What the run's own log says."""
    log = (place / "run" / "log.jsonl").read_text("utf-8").splitlines()
    events = [json.loads(line) for line in log]
    return {
        "parameters": events[0]["parameters"],
        "threads": events[0]["threads"],
        "device": events[0]["device"],
        "steps": events[-1]["step"],
        "seconds": next(event["seconds"] for event in reversed(events) if event["event"] == "end"),
        "call_seconds": round(seconds, 1),
        "calls": sum(event["event"] in ("begin", "resume") for event in events),
        "curve": [[event["step"], event["loss"]] for event in events if event["event"] == "train"],
    }


# ---------------------------------------------------------------------------------- testing


def tested(place: Path, prepared: Path, scale: Scale, *, device: str) -> dict[str, Any]:
    """Scores on the test set of each length, and on all of those that are no longer than training's."""
    from trmt.bundles import bundles, checkpoints

    bundle = bundles.load_bundle(checkpoints.find_bundle(place / "run"), device=device)
    bundle.net.eval()
    by_length, together = {}, ([], [])
    for sentences in (*scale.shorter, *scale.longer):
        sources, references = texts.read(prepared / "text", texts.name_of(sentences))
        found = translated(bundle, sources, device=device)
        words = sum(len(line.split()) for line in sources) / len(sources)
        by_length[str(sentences)] = {"words": round(words, 2), **scores(found, references)}
        by_length[str(sentences)]["nll"] = likelihood(bundle, sources, references, device=device)
        if sentences in scale.shorter:
            together[0].extend(found)
            together[1].extend(references)
    whole = scores(*together)
    nlls = [by_length[str(sentences)]["nll"] for sentences in scale.shorter]
    whole["nll"] = round(sum(nlls) / len(nlls), 5)
    return {"all": whole, "lengths": by_length}


def translated(bundle: Any, sources: Sequence[str], *, device: str) -> list[str]:
    """Greedy translations, of whatever length the network gives them, up to a limit that holds for all."""
    from trmt.decoding.engine import Engine
    from trmt.decoding.greedy import Greedy
    from trmt.decoding.request import Batching, Request

    source, target = bundle.tokenizer.source, bundle.tokenizer.target
    engine = Engine(
        bundle.net,
        Greedy(),
        bos=target.bos,
        eos=target.eos,
        banned=target.banned_ids,
        batching=Batching(sentences=64, tokens=1 << 15),
    )
    requests = [
        Request((*ids, source.eos), 2 * len(ids) + 10, key=number)
        for number, ids in enumerate(source.encode(sources))
    ]
    ids: dict[int, Sequence[int]] = {
        request.key: hypotheses[0].ids for request, hypotheses in engine.translate(requests)
    }
    return [target.decode(ids[index]).strip() for index in range(len(requests))]


def scores(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
    """BLEU and chrF by sacreBLEU, and how many are right to the letter."""
    from trmt.scoring import ScoreOptions, score

    found = score(list(hypotheses), [list(references)], options=ScoreOptions(metrics=("bleu", "chrf")))
    exact = sum(map(str.__eq__, hypotheses, references)) / len(references)
    return {
        **{name: round(one.value, 3) for name, one in found.items()},
        "exact": round(100 * exact, 2),
    }


@torch.inference_mode()
def likelihood(bundle: Any, sources: Sequence[str], references: Sequence[str], *, device: str) -> float:
    """Nats that the references cost, each piece of them and their ends."""
    from trmt.nets.ragged import Ragged, Source

    source, target = bundle.tokenizer.source, bundle.tokenizer.target
    pairs = list(zip(source.encode(list(sources)), target.encode(list(references)), strict=True))
    total, count = 0.0, 0
    for at in range(0, len(pairs), BATCH):
        some = pairs[at : at + BATCH]
        read = Source.of([[*ids, source.eos] for ids, _ in some], device)
        before = Ragged.of([[target.bos, *ids] for _, ids in some], device)
        after_N = Ragged.of([[*ids, target.eos] for _, ids in some], device).ids_N
        logits_NV = bundle.net.readout(bundle.net(read, before).hidden).float()
        told_N = logits_NV.log_softmax(-1).gather(1, after_N[:, None])
        total -= float(told_N.double().sum())
        count += len(after_N)
    return round(total / count, 5) if math.isfinite(total) else 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and test one system with one seed.")
    parser.add_argument("work", type=Path)
    parser.add_argument("system", choices=list(BY_NAME))
    parser.add_argument("seed", type=int)
    parser.add_argument("--scale", choices=list(SCALES), default="phrasebook")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    from trmt.cli.train import make_ready
    from trmt.training.stopping import Interrupted

    make_ready(given.threads)
    try:
        run(given.work, BY_NAME[given.system], given.seed, SCALES[given.scale], device=given.device)
    except Interrupted as stopped:
        raise SystemExit(stopped.exit_code) from None


if __name__ == "__main__":
    main()
