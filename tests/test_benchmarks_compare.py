"""`python -m benchmarks compare`: rows of two results, and of two commits in a repository as small as can be."""

import json
import subprocess

import pytest

from benchmarks import __main__ as command
from benchmarks import compare_commits
from benchmarks.counting import callgrind, loops

# --- results ---


def row(contender="fusedopt", ms=10.0, spread=0.2, **other):
    row = {"case": "adamw-small", "contender": contender, "median_ms": ms, "p20_ms": ms - spread, "p80_ms": ms + spread}
    return row | {"verdict": "ok", "machine": "a", "threads": 2, "torch": "2.13.0", "commit": "abc"} | other


def results(path, *rows):
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"suite": "optim"}, *rows)))
    return str(path)


def told(tmp_path, a, b, *arguments):
    return command.main(["compare", results(tmp_path / "a.jsonl", *a), results(tmp_path / "b.jsonl", *b), *arguments])


@pytest.mark.parametrize(
    ("b", "status", "said"),
    [
        (row(ms=11.0), 1, "slower"),
        (row(ms=10.3), 0, "within noise"),
        (row(ms=10.45), 0, "slower"),  # beyond the noise, not beyond the tolerance
        (row(ms=9.0), 0, "faster"),
        (row(ms=20.0, spread=12.0), 0, "within noise"),
        (row(verdict="wrong"), 1, "no longer right: wrong"),
        (
            row(verdict="raised: TypeError") | dict.fromkeys(("median_ms", "p20_ms", "p80_ms")),
            1,
            "no longer right: rais",
        ),
        (row("torch fused", ms=20.0), 0, "only in A"),
    ],
)
def test_rows_are_compared(tmp_path, capsys, b, status, said):
    assert told(tmp_path, [row()], [b]) == status
    assert said in capsys.readouterr().out


def test_peers_may_become_slower_and_a_tolerance_may_be_given(tmp_path):
    assert told(tmp_path, [row("torch fused")], [row("torch fused", ms=20.0)]) == 0
    assert told(tmp_path, [row("fusedopt inplace")], [row("fusedopt inplace", ms=11.0)], "--tolerance", "0.2") == 0
    assert told(tmp_path, [row()], [row(ms=20.0)], "--cases", "bf16") == 0


def test_a_ceiling_takes_the_machines_mood_out(tmp_path):
    was = row(ceiling_fraction=0.8)  # the ceiling took 8 ms
    assert told(tmp_path, [was], [row(ms=20.0, spread=0.4, ceiling_fraction=0.8)]) == 0
    assert told(tmp_path, [was], [row(ceiling_fraction=0.7)]) == 1
    assert told(tmp_path, [was], [row(ms=20.0, ceiling_fraction=None)]) == 1
    host = row(ceiling_fraction=0.04)  # far from its ceiling, whose time says nothing of it
    assert told(tmp_path, [host], [row(ceiling_fraction=0.03)]) == 0


def test_what_makes_times_incomparable_is_told(tmp_path, capsys):
    assert told(tmp_path, [row()], [row(machine="b", threads=1)]) == 0
    out = capsys.readouterr().out
    assert "warning: machine differs: a / b" in out and "warning: threads differs: 2 / 1" in out
    assert "torch differs" not in out


def test_folders_are_compared_by_suite(tmp_path, capsys):
    for name, ms in (("a", 10.0), ("b", 12.0)):
        (tmp_path / name).mkdir()
        results(tmp_path / name / "optim.jsonl", row(ms=ms))
        results(tmp_path / name / "modes.jsonl", {"case": "seed", "contender": "f32", "val_loss": 1.0})
    assert command.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "optim adamw-small fusedopt: slower, +20.0%" in capsys.readouterr().out


def test_what_is_neither_results_nor_commit_is_named(tmp_path):
    with pytest.raises(
        SystemExit, match="'no-such-thing' is neither a results file or folder that exists nor a commit"
    ):
        command.main(["compare", "no-such-thing", "HEAD"])
    with pytest.raises(SystemExit, match="holds no rows with a median_ms"):
        told(tmp_path, [], [])


# --- commits ---


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Two commits whose fusedopt/_native.so says how slow it is; building and measuring are replaced."""

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *arguments], cwd=source, check=True, capture_output=True)

    source = tmp_path / "source"
    (source / "fusedopt").mkdir(parents=True)
    git("init", "-q")
    for ms in ("10", "12"):
        (source / "fusedopt" / "_native.so").write_text(ms)
        git("add", ".")
        git("commit", "-q", "-m", ms)
    order = []

    def measured(folder, suite, cases, out):
        ms = float((folder / "fusedopt" / "_native.so").read_text())
        order.append((ms, suite, cases))
        return [row(ms=ms)]

    monkeypatch.setattr(compare_commits, "ROOT", source)
    monkeypatch.setattr(compare_commits, "build", lambda folder: None)
    monkeypatch.setattr(compare_commits, "round_of", measured)
    monkeypatch.setattr(callgrind, "missing", lambda: "needs valgrind")
    monkeypatch.setattr(loops, "count", lambda library: {"loop sgd f32: scalar floats": float(library.read_text())})
    return source, order


def worktrees(source):
    listed = subprocess.run(["git", "worktree", "list"], cwd=source, capture_output=True, text=True, check=True)
    return listed.stdout.count("\n")


def test_commits_are_measured_in_turns(repository, capsys):
    source, order = repository
    command_line = ["compare", "HEAD~1", "HEAD", "--suite", "step", "--cases", "adamw", "--rounds", "2"]
    assert command.main(command_line) == 1
    assert order == [(ms, "step", "adamw") for ms in (10, 12, 10, 12)]
    assert "step adamw-small fusedopt: slower, +20.0%" in capsys.readouterr().out
    assert command.main([*command_line[:2], "HEAD~1", *command_line[3:]]) == 0
    assert worktrees(source) == 1


def test_counts_of_commits(repository, capsys):
    source, _ = repository
    assert command.main(["compare", "HEAD~1", "HEAD", "--counts"]) == 1
    out = capsys.readouterr()
    assert "1.2000" in out.out and "1 counts, of which 1 differ" in out.out
    assert "left out: needs valgrind" in out.err
    assert command.main(["compare", "HEAD", "HEAD~1", "--counts"]) == 0
    assert command.main(["compare", "HEAD", "HEAD", "--counts"]) == 0
    assert "1 counts, none of which differs" in capsys.readouterr().out
    assert worktrees(source) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_worktrees_are_gone_whatever_happens(repository, monkeypatch, error):
    source, _ = repository

    def stop(folder):
        assert worktrees(source) > 1
        raise error

    monkeypatch.setattr(compare_commits, "build", stop)
    if error is KeyboardInterrupt:
        assert command.main(["compare", "HEAD~1", "HEAD"]) == 130
    else:
        with pytest.raises(SystemExit):
            command.main(["compare", "HEAD~1", "HEAD"])
    assert worktrees(source) == 1


def test_rounds_are_combined():
    turns = [
        [row(ms=ms, ceiling_fraction=f, verdict=v)]
        for ms, f, v in ((9, 0.5, "ok"), (30, 0.1, "wrong"), (10, 0.4, "ok"))
    ]
    (one,) = compare_commits.combined(turns)
    assert {key: one[key] for key in ("median_ms", "p20_ms", "p80_ms", "ceiling_fraction", "verdict")} == {
        "median_ms": 10,
        "p20_ms": 9.8,
        "p80_ms": 10.2,
        "ceiling_fraction": 0.4,
        "verdict": "wrong",
    }


def test_the_program_is_this_checkouts_and_the_kernels_are_the_commits(repository):
    with compare_commits.checkouts(["HEAD~1", "HEAD"]) as folders:
        for folder in folders:
            first, then = compare_commits.path_of(folder)
            assert (first / "benchmarks").resolve() == compare_commits.BENCHMARKS
            assert (then / "fusedopt" / "_native.so").exists() and not (first / "fusedopt").exists()
