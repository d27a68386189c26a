"""The search for a tuned table: nothing wrong is timed or stored, what is stored is read back, what was cut goes on."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from bench import tune
from bench.subjects import gemms
from bench.subjects.accuracy import verify
from bench.subjects.problems import Problem, Use
from bench.tuning import choices, inputs, lab, precompile, search
from bench.tuning import steps as step_times
from bench.tuning.candidates import candidates
from bench.tuning.lab import DeviceLab, Shape, shapes
from bench.tuning.search import Choice, Journal, Table
from dcgan.arch import PRESETS, Arch
from dcgan.errors import run_command
from kernels import tuning
from kernels._triton.config import ConvConfig, WgradConfig
from kernels.geometry import CudaConfig

ARCH = PRESETS["dcgan64"].arch
HEADER = {"device": "NVIDIA Test 1", "torch": "2", "triton": "3", "kernels_hash": "abc", "record": None}
TILE = ConvConfig(1, 8, 8, 64, 64, 4, 3, True)


class FakeLab:
    """Candidates with known times, of which some are wrong; it notes what was timed."""

    def __init__(self, times, wrong=()):
        self.times, self.wrong, self.checked, self.timed = times, set(wrong), [], set()

    def check(self, recipe):
        self.checked.append(recipe)
        return "error over what is allowed: y 7" if recipe in self.wrong else None

    def time_us(self, recipes, rounds):
        self.timed |= set(recipes)
        return {recipe: self.times[recipe] for recipe in recipes}


def test_the_fastest_right_candidate_is_chosen_and_a_wrong_one_is_never_timed():
    times = {"default": 9.0, "fast": 5.0, "wrong": 1.0, "slow": 20.0, "library": 7.0}
    bench = FakeLab(times, wrong={"wrong"})
    choice = search.search(["default", "fast", "wrong", "slow"], bench)
    assert (choice.recipe, choice.us, choice.library_us, choice.timed) == ("fast", 5.0, 7.0, 4)
    assert choice.rejected == {"wrong": "error over what is allowed: y 7"} and "wrong" not in bench.timed


def test_the_library_wins_where_it_is_faster_and_what_may_not_ship_is_not_even_run():
    bench = FakeLab({"default": 9.0, "spills": 1.0, "library": 7.0})
    choice = search.search(["default", "spills"], bench, {"spills": "spills 8 bytes per thread"})
    assert choice.recipe == "library" and bench.checked == ["default", "library"]
    assert choice.rejected == {"spills": "spills 8 bytes per thread"}


def test_the_extension_competes_where_it_is_named(tmp_path):
    bench = FakeLab({"default": 9.0, "cuda": 3.0, "library": 7.0})
    choice = search.search(["default"], bench, others=("library", "cuda"))
    assert (choice.recipe, choice.us, choice.library_us, choice.cuda_us) == ("cuda", 3.0, 7.0, 3.0)
    table = search.Table(tmp_path / "t.json", {"device": "GPU"}, "sources")
    entry = table.put_tile("conv", "3x64@64", "bf16", 256, choice, None)
    assert entry["recipe"] == "cuda" and "tile" not in entry
    assert tuning.parse(table.data | {"device": "GPU"}, "GPU").tiles["conv", "bf16"][0].recipe == "cuda"


def test_a_tile_of_the_extension_is_kept_with_its_entry(tmp_path):
    others = ("library", "cuda 128x2", "cuda 64x4")
    bench = FakeLab({"default": 9.0, "cuda 128x2": 4.0, "cuda 64x4": 3.0, "library": 7.0})
    choice = search.search(["default"], bench, others=others)
    assert (choice.recipe, choice.library_us, choice.cuda_us) == ("cuda 64x4", 7.0, 3.0)
    table = search.Table(tmp_path / "t.json", {"device": "GPU"}, "sources")
    table.put_tile("conv", "64x128@32", "bf16", 256, choice, CudaConfig(64, 4))
    entry = tuning.parse(table.data | {"device": "GPU"}, "GPU").tiles["conv", "bf16"][0]
    assert (entry.recipe, entry.tile) == ("cuda", CudaConfig(64, 4))


def test_the_extensions_tiles_of_a_shape(monkeypatch):
    monkeypatch.setattr(lab, "runnable", lambda recipes, *_: list(recipes))
    arch, device = PRESETS["dcgan64"].arch, torch.device("meta")
    found = {shape.name: list(lab.extension(shape, device)) for shape in lab.shapes(arch, [64], "bf16")}
    clusters = [f"cuda 64x{n}" for n in (1, 2, 4)]
    assert found["conv_transpose/128x64@16/bf16/b64"] == clusters
    assert found["conv/256x512@8/bf16/b64"] == [f"cuda 128x{n}" for n in (1, 2, 4)] + clusters
    assert found["wgrad/128x64@16/bf16/b128"] == [f"cuda 128x{n}" for n in (1, 2, 4)] + clusters
    assert found["conv/3x64@64/bf16/b128"] == ["cuda"], "the image's kernels have no choice of tile"
    single = {shape.name: list(lab.extension(shape, device)) for shape in lab.shapes(arch, [64], "fp32")}
    assert not single["conv/256x512@8/fp32/b64"]


def test_nothing_right_is_no_choice():
    bench = FakeLab({"default": 1.0, "library": 1.0}, wrong={"default", "library"})
    assert search.search(["default"], bench).recipe is None and not bench.timed
    alone = search.search(["default"], FakeLab({"default": 1.0}, wrong={"library"}))
    assert alone.recipe == "default" and alone.library_us is None


def test_only_the_best_few_and_the_default_are_timed_at_length():
    names = [f"tile{k}" for k in range(9)]
    lengths = {}

    class Lab(FakeLab):
        def time_us(self, recipes, rounds):
            lengths[rounds] = set(recipes)
            return super().time_us(recipes, rounds)

    search.search(names, Lab({name: 20.0 - k for k, name in enumerate(names)} | {"library": 1.0}))
    assert lengths[search.ROUNDS["first"]] == {*names, "library"}
    assert lengths[search.ROUNDS["last"]] == {"tile0", "tile8", "tile7", "tile6", "tile5", "library"}


# The table


def test_what_is_written_is_what_dispatch_reads(tmp_path):
    table = Table(tmp_path / "t.json", HEADER, "s1")
    table.put_tile("conv", "64x128@32", "bf16", 256, Choice("tile3", 12.5, 14.0), TILE)
    table.put_tile("wgrad", "64x3@32", "bf16", 128, Choice("library", 8.0, 8.0), None)
    table.put_op("conv_bn_act", "64x128@32", "bf16", 256, "triton")
    table.put_op("adam_step", "any", "fp32", 1000, "eager")
    data = json.loads((tmp_path / "t.json").read_text())
    assert {key: data[key] for key in HEADER} == HEADER
    read = tuning.parse(data, "NVIDIA Test 1")
    (entry,) = read.tiles["conv", "bf16"]
    assert (entry.shape, entry.images, entry.recipe, entry.tile) == ((64, 128, 32), 256, "triton", TILE)
    (entry,) = read.tiles["wgrad", "bf16"]
    assert (entry.recipe, entry.tile) == ("library", None)
    assert read.ops["conv_bn_act", "bf16"][0].recipe == "triton" and read.ops["adam_step", "fp32"][0].images == 1000


def test_an_existing_table_is_merged_and_never_half_written(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    Table(path, HEADER, "s1").put_tile("conv", "64x128@32", "bf16", 256, Choice("a", 12.5, None), TILE)
    later = Table(path, HEADER | {"kernels_hash": "def"}, "s2")
    assert not later.has("conv", "64x128@32", "bf16", 256), "measured from other sources"
    assert Table(path, HEADER, "s1").has("conv", "64x128@32", "bf16", 256)
    later.put_op("conv_bn_act", "64x128@32", "bf16", 256, "library")
    before = path.read_text()
    data = json.loads(before)
    assert data["kernels_hash"] == "def" and data["tiles"]["conv"]["64x128@32"]["bf16"]["256"]["us"] == 12.5
    monkeypatch.setattr(search.os, "fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        later.put_op("conv_bn_act", "64x128@32", "bf16", 512, "eager")
    assert path.read_text() == before
    with pytest.raises(ValueError, match="not a tuned table of"):
        Table(path, HEADER | {"device": "NVIDIA Test 2"}, "s1")


def test_the_journal_blames_what_never_came_back(tmp_path):
    path = tmp_path / "t.journal"
    journal = Journal(path)
    journal.begin("a"), journal.end("a"), journal.begin("b")
    again = Journal(path)
    assert again.blamed == {"b"}
    again.close()
    assert not Journal(path).blamed and not path.exists()


# On a device, here the CPU


PROBLEM = Problem("conv", 16, 32, 4, 2, "fp32", "D", "forward", Use("activation", "relu"))


def test_a_wrong_candidate_is_rejected_by_the_lab(tmp_path, monkeypatch):
    """A launcher that is right on one tile and leaves out a column on the other."""

    class FakeJob:
        def __init__(self, operands, config):
            self.operands, self.config = operands, config

        def run(self):
            y, partials = gemms.plain(PROBLEM, self.operands)
            if self.config == "broken":
                y = y.clone()
                y[..., -1] = 0
            return y, partials

    monkeypatch.setattr(gemms, "job", lambda problem, operands, config: FakeJob(operands, config))
    tiles = {"right": "right", "broken": "broken"}
    bench = DeviceLab(Shape(PROBLEM, (PROBLEM.use,)), tiles, torch.device("cpu"), Journal(tmp_path / "j"))
    choice = search.search(list(tiles), bench)
    assert "broken" in choice.rejected and "y" in choice.rejected["broken"] and choice.recipe in ("right", "library")
    assert choice.timed == 2 and choice.us > 0


def test_a_candidate_that_ended_the_process_is_not_run_again(tmp_path):
    shape = Shape(PROBLEM, (PROBLEM.use,))
    Journal(tmp_path / "j").begin(f"{shape.name} tile1")
    bench = DeviceLab(shape, {"tile1": None}, torch.device("cpu"), Journal(tmp_path / "j"))
    bench.subjects = None  # it would raise if it were looked at
    assert bench.check("tile1") == "it ended the process the last time"


class FakeCompiler:
    workers = 2

    def __init__(self, results):
        self.results = results

    def compile(self, launches_of, arguments):
        return [self.results(problem, config) for problem, config, _ in arguments]


def tuner_of(tmp_path, compiler, monkeypatch, minutes=1.0):
    class Lab(FakeLab):
        def __init__(self, shape, tiles, device, journal):
            super().__init__(dict.fromkeys([*tiles, "library"], 2.0) | {"tile1": 1.0})

    monkeypatch.setattr(tune, "DeviceLab", Lab)
    table = Table(tmp_path / "t.json", HEADER, "s1")
    said = []
    deadline = tune.time.monotonic() + minutes * 60
    made = tune.Tuner(ARCH, torch.device("cpu"), 90, table, Journal(None), compiler, deadline, said.append)
    return made, said


def test_the_tuner_writes_every_shape_and_goes_on_where_it_was_cut(tmp_path, monkeypatch):
    wanted = [s for s in shapes(ARCH, (128,), "bf16") if s.problem.kernel == "wgrad"]
    fine = [{"registers": 100, "spills": 0, "shared_bytes": 1000}]
    tuner, said = tuner_of(tmp_path, FakeCompiler(lambda problem, config: fine), monkeypatch)
    assert tuner.tiles(wanted[:2]) == 0 and len(said) == 2
    entries = tuning.parse(json.loads((tmp_path / "t.json").read_text()), "NVIDIA Test 1").tiles["wgrad", "bf16"]
    assert {entry.tile for entry in entries} == {candidates(shape.problem, 90)[1] for shape in wanted[:2]}
    again, said = tuner_of(tmp_path, FakeCompiler(lambda problem, config: fine), monkeypatch)
    assert again.tiles(wanted[:3]) == 0 and len(said) == 1, "two were known"
    late, _ = tuner_of(tmp_path, FakeCompiler(lambda problem, config: fine), monkeypatch, minutes=-1.0)
    assert late.tiles(wanted) == len(wanted) - 3


def test_a_tile_that_spills_with_any_epilogue_does_not_ship(tmp_path, monkeypatch):
    def spills(problem, config):
        heavy = problem.use.mode == "batch_norm_grad" and config == candidates(problem, 90)[1]
        return [{"registers": 255, "spills": 8 * heavy, "shared_bytes": 1000}]

    shape = next(s for s in shapes(ARCH, (128,), "bf16") if len({use.mode for use in s.uses}) == 2)
    tuner, said = tuner_of(tmp_path, FakeCompiler(spills), monkeypatch)
    tuner.tiles([shape])
    place = json.loads((tmp_path / "t.json").read_text())["tiles"][shape.problem.kernel][shape.problem.key]
    entry = place["bf16"][str(shape.problem.images)]
    assert entry["us"] == 2.0 and "1 not" in said[0], "the fastest, tile1, spilled"


def test_ops_are_decided_by_all_recipes_and_eager_keeps_what_is_not_clearly_won(tmp_path, monkeypatch):
    assert choices.best({"eager": 10.0, "triton": 9.9}) == "eager"
    assert choices.best({"eager": 10.0, "triton": 9.0, "library": 9.5}) == "triton"
    assert choices.best({"triton": 9.0}) == "triton" and choices.best({}) is None
    tuner, said = tuner_of(tmp_path, None, monkeypatch)
    small = Arch(image_size=16, nz=4, ngf=4, ndf=4)
    wanted = choices.entries(small, [2], "fp32")
    assert {entry.op for entry in wanted} >= {"conv_bn_act", "conv_act", "gan_loss", "adam_step", "gather_images"}
    assert tuner.ops(wanted) == 0 and len(said) == len(wanted) and all("eager" in line for line in said)
    read = tuning.parse(json.loads((tmp_path / "t.json").read_text()), "NVIDIA Test 1")
    assert {op for op, _ in read.ops} == {entry.op for entry in wanted}
    assert {precision for op, precision in read.ops if op == "adam_step"} == {"fp32", "tf32"}


def small_reads():
    """A forward pass with a weight gradient of each kind, and D's alone, as its frozen pass has it."""
    found = choices.reads(Arch(image_size=32, nz=4, ngf=4, ndf=4), [2], "fp32")
    kinds = {read.kind: read for read in found}
    assert set(kinds) == {"conv", "conv_forward", "conv_transpose"} and len(found) == 5
    return list(kinds.values())


def fine(problem, config):
    return [{"registers": 100, "spills": 0, "shared_bytes": 1000}]


def test_inputs_are_decided_and_not_measured_again_on_the_same_tiles(tmp_path, monkeypatch):
    wanted, times = small_reads(), {"applied": 10.0, "deferred": 9.0}
    monkeypatch.setattr(inputs, "time_us", lambda parts, ways, device: {way: times[way] for way in ways})
    tuner, said = tuner_of(tmp_path, FakeCompiler(fine), monkeypatch)
    assert tuner.inputs(wanted) == 0 and all(
        line.endswith("deferred 9.0 µs, applied 10.0 µs; deferred") for line in said
    )
    data = json.loads((tmp_path / "t.json").read_text())
    read = tuning.parse(data, "NVIDIA Test 1").inputs
    assert {kind for kind, _ in read} == {read.kind for read in wanted} and data["measured"][wanted[0].name][
        "us"
    ] == times
    shapes_read = {(kind, *entry.shape, entry.images) for (kind, _), entries in read.items() for entry in entries}
    assert ("conv", 8, 16, 8, 4) in shapes_read and ("conv_forward", 8, 16, 8, 2) in shapes_read
    again, said = tuner_of(tmp_path, FakeCompiler(fine), monkeypatch)
    assert again.inputs(wanted) == 0 and not said, "all were known"
    tile = WgradConfig(1, 4, 4, 16, 16, 2, 4, 3, False)
    again.table.put_tile("wgrad", "16x8@4", "fp32", 4, Choice("tile3", 1.0, 2.0), tile)
    times["deferred"] = 9.9
    assert again.inputs(wanted) == 0 and len(said) == 1 and said[0].endswith("applied 10.0 µs; applied"), "a new tile"
    late, _ = tuner_of(tmp_path, FakeCompiler(fine), monkeypatch, minutes=-1.0)
    late.again = True
    assert late.inputs(wanted) == len(wanted)


def test_a_load_that_spills_or_is_wrong_is_never_timed(tmp_path, monkeypatch):
    timed = []
    monkeypatch.setattr(inputs, "time_us", lambda parts, ways, device: timed.append(ways) or dict.fromkeys(ways, 1.0))

    def spills(problem, config):
        return [{"registers": 255, "spills": 8 * (problem.use.before is not None), "shared_bytes": 1000}]

    (read, *_) = small_reads()
    tuner, said = tuner_of(tmp_path, FakeCompiler(spills), monkeypatch)
    tuner.inputs([read])
    assert (
        timed == [["applied"]] and "deferred: spills 8 bytes" in said[0] and said[1].endswith("applied 1.0 µs; applied")
    )
    parts = inputs.parts

    def forgetful(p, o):
        return gemms.plain(p, replace(o, first=o.first.y)) if p.kernel != "wgrad" else gemms.plain(p, o)

    def broken(read, device):
        return [replace(part, products=part.products | {"deferred": forgetful}) for part in parts(read, device)]

    monkeypatch.setattr(inputs, "parts", broken)
    tuner, said = tuner_of(tmp_path, FakeCompiler(fine), monkeypatch)
    tuner.again = True
    tuner.inputs([read])
    assert timed[1:] == [["applied"]] and "deferred: error over what is allowed: y" in said[0]


def test_both_ways_are_right_and_timed_without_the_map_s_own_writing():
    device = torch.device("cpu")
    for read in small_reads():
        parts = inputs.parts(read, device)
        assert [part.problem.kernel for part in parts] == [read.layer.kind, "wgrad"][: 1 + read.weights]
        assert all(verify(part.subject(), way)[1] is None for part in parts for way in tuning.INPUTS)
        assert set(parts[0].calls()) == {*tuning.INPUTS, inputs.WRITTEN}
        assert all(set(part.calls()) == set(tuning.INPUTS) for part in parts[1:])
    p50 = {"applied": 5e-3, "deferred": 4e-3, inputs.WRITTEN: 1e-3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "interleave", lambda calls, *_: SimpleNamespace(p50_ms=p50.get))
        wide = inputs.time_us(inputs.parts(small_reads()[0], device), list(tuning.INPUTS), device)
    assert wide == pytest.approx({"applied": 9.0, "deferred": 7.0}), "forward less the writing, and the weight gradient"


def test_ops_are_decided_on_the_tiles_just_found(tmp_path):
    table = Table(tmp_path / "elsewhere.json", HEADER, "s1")
    table.put_tile("conv", "64x128@32", "bf16", 256, Choice("tile3", 12.5, 14.0), TILE)
    before = tuning.FOLDER
    with choices.in_use(table):
        assert tuning.tile("NVIDIA Test 1", "conv", (64, 128, 32), "bf16", 256).tile == TILE
    assert before == tuning.FOLDER and tuning.tile("NVIDIA Test 1", "conv", (64, 128, 32), "bf16", 256) is None


# How a step is launched


def stands_in(monkeypatch, times_us, wrong=()):
    """The tuner's steps on a CPU: built without a graph, their times given, those of `wrong` ways found wrong."""
    build, names = step_times.ladder.build, {False: "plain", True: "dependent"}
    built = []

    def launched(rung, *arguments):
        built.append(rung)
        if names[rung.dependent] in wrong:
            raise RuntimeError("CUDA error: of that way\nmore")
        return build(replace(rung, graph=False), *arguments)

    monkeypatch.setattr(step_times.ladder, "unavailable", lambda *_: None)
    monkeypatch.setattr(step_times.ladder, "build", launched)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    timed = SimpleNamespace(p50_ms=lambda way: times_us[way] / 1e3)
    monkeypatch.setattr(step_times, "interleave", lambda calls, *_: timed if set(calls) <= set(times_us) else None)
    return built


def test_the_faster_way_to_launch_a_step_is_stored_and_read_back(tmp_path, monkeypatch):
    small = Arch(image_size=16, nz=8, ngf=8, ndf=8)
    wanted = step_times.steps(small, [4, 2, 4], "fp32")
    assert [steps.name for steps in wanted] == ["launch/step/fp32/b4", "launch/step/fp32/b2"]
    assert step_times.steps(small, [4], "fp16") == [], "no rung of the ladder"
    ahead = []
    compiler = SimpleNamespace(workers=2, compile=lambda *work: ahead.append(work))
    tuner, said = tuner_of(tmp_path, compiler, monkeypatch)
    built = stands_in(monkeypatch, {"plain": 100.0, "dependent": 99.0})
    assert tuner.launches(wanted[:1]) == 0 and [rung.dependent for rung in built] == [False, True]
    ((share, (first, second)),) = ahead
    assert share is step_times.ahead.share_of_table and first[:3] == second[:3]
    assert [rung.dependent for _, _, rung in first[1]] == [False, True] and first[2:] == (HEADER["device"], 0, 2)
    stands_in(monkeypatch, {"plain": 50.0, "dependent": 50.0})
    assert tuner.launches(wanted) == 0 and said[1].endswith("; plain"), "the first is known, the second is a draw"
    read = tuning.parse(tuner.table.data | {"device": "GPU"}, "GPU").launch["step", "fp32"]
    assert [(entry.images, entry.recipe) for entry in read] == [(4, "dependent"), (2, "plain")]
    tuner.again = True
    stands_in(monkeypatch, {"plain": 50.0}, wrong=("dependent",))
    assert tuner.launches(wanted[:1]) == 0 and "of that way" in said[2] and said[3].endswith("plain 50.0 µs; plain")


# The command


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.tune", *arguments])
    code = run_command(tune.command)
    return code, capsys.readouterr()


def test_a_dry_run_names_the_candidates_and_compiles_nothing(monkeypatch, capsys):
    monkeypatch.setattr(precompile, "compile_one", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, said = command(monkeypatch, capsys, "--dry-run", "--batch", "128")
    assert code == 0 and "conv/64x128@32/bf16/b256: 36 tiles, for statistics g2 merged" in said.out
    code, said = command(monkeypatch, capsys, "--dry-run", "--only", "wgrad/64x3@32/bf16/b128")
    assert code == 0 and "WgradConfig(" in said.out and "1 shapes" in said.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--batch", "0"), "--batch 0"),
        (("--minutes", "0"), "--minutes 0"),
        (("--only", "("), "not a regular expression"),
        (("--only", "nothing of the kind", "--dry-run"), "no shape, input, op or step"),
        ((), "no GPU here"),
    ],
)
def test_wrong_input_is_exit_code_2(monkeypatch, capsys, arguments, named):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, said = command(monkeypatch, capsys, *arguments)
    assert code == 2 and named in said.err
