"""The pure parts of the benchmarks: reports, modes, workloads, reasons, percentiles."""

import argparse
import json
import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import harness
import machine
import offline_throughput
import workload
from child import Child, ChildFailed, death_reason
from engines import Mode, NotRunning, Result, checked, parse_mode
from peer_process import PEERS
from percentiles import Stream, summary_ms, tokens_per_s
from report import Metric, Report
from speculation import KINDS

RATE, DELAY = Metric("rate", "tokens/s"), Metric("delay", "s", higher_is_better=False, digits=2)
WATCHED = {"pressure_before": 3.0, "pressure_after": 80.0, "seconds": 1.0, "others_cores": 0.02}


def make_report(**options) -> Report:
    report = Report("some_benchmark", "width", [RATE, DELAY], {"rounds": 3}, bases=["peer"], **options)
    report.engines = {"peer": {}, "ours": {}}
    # The machine becomes half as fast from round to round; ours is twice as fast as the peer in each.
    for number, speed in enumerate((4.0, 2.0, 1.0)):
        report.add(16, "ours", "rate", 20 * speed, number)
        report.add(16, "peer", "rate", 10 * speed, number)
    return report


class TestReport:
    def test_ratios_are_taken_round_by_round(self):
        report = make_report()
        report.add(4, "peer", "rate", 10.0, 0)
        report.add(4, "ours", "rate", 80.0, 1)       # the peer has no value of that round
        report.add(4, "ours", "rate", 15.0, 0)
        assert report.ratio(16, "ours", "peer", RATE) == 2.0
        assert report.ratio(16, "peer", "peer", RATE) is None
        assert report.ratio(4, "ours", "peer", RATE) == 1.5
        assert report.ratio(64, "ours", "peer", RATE) is None

    def test_a_ratio_of_a_delay_says_how_many_times_sooner(self):
        report = make_report()
        report.add(16, "ours", "delay", 0.5)
        report.add(16, "peer", "delay", 2.0)
        assert report.ratio(16, "ours", "peer", DELAY) == 4.0

    def test_table(self):
        text = make_report().markdown(WATCHED)
        assert "| width | engine | rate, tokens/s (median) | all rounds | × peer |\n|---|---|---|---|---|" in text
        assert "| 16 | peer | 20.0 | 40.0, 20.0, 10.0 |  |\n| 16 | ours | 40.0 | 80.0, 40.0, 20.0 | 2.00 |" in text
        assert "CPU pressure 3 % before, 80 % after; processes of others used 0.02 cores meanwhile" in text
        assert "delay" not in text          # nothing was measured of it

    def test_wide_table_has_a_column_for_each_metric(self):
        report = make_report(wide=True)
        report.add(16, "ours", "delay", 0.126)
        text = report.markdown(WATCHED)
        assert "| 16 | peer | 20.0 |  |\n| 16 | ours | 40.0 | 0.13 |" in text
        assert "| width | × peer | rate | delay |\n|---|---|---|---|\n| 16 | ours | 2.00 |  |" in text

    def test_what_did_not_run_is_named(self):
        report = make_report()
        report.missing["other peer"] = "not installed"
        report.note("once")
        report.note("once")
        assert report.markdown(WATCHED).endswith("Not run:\n- other peer: not installed\n\n- once")

    def test_json_holds_all_rounds(self):
        report = make_report()
        report.missing["other peer"] = "not installed"
        found = json.loads(json.dumps(report.as_json(WATCHED)))
        assert [r["value"] for r in found["rounds"] if r["engine"] == "ours"] == [80.0, 40.0, 20.0]
        assert found["medians"][1] == {"case": 16, "engine": "ours", "metric": "rate", "median": 40.0, "ratios": {"peer": 2.0}}
        assert found["not_run"] == {"other peer": "not installed"} and found["machine"]["versions"]["torch"]

    def test_files(self, tmp_path, capsys):
        make_report().finish(tmp_path)
        assert json.loads((tmp_path / "some_benchmark.json").read_text())["benchmark"] == "some_benchmark"
        assert "| 16 | ours | 40.0 |" in capsys.readouterr().out

    def test_plot(self, tmp_path):
        pytest.importorskip("matplotlib")
        from plot import draw

        report = make_report()
        report.add("text", "ours", "delay", 1.0)
        report.add(64, "ours", "rate", 90.0)
        assert draw(report, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


class TestWorkload:
    def test_w_is_the_agreed_one(self):
        work = workload.make_workload()
        assert (sum(len(p) for p, _ in work), sum(n for _, n in work)) == (8355, 5088)
        assert (sum(len(p) for p, _ in work[:8]), sum(n for _, n in work[:8])) == (1081, 737)

    def test_due_times_have_the_rate(self):
        due_s = workload.poisson_times(4.0, 2000, seed=1)
        assert due_s == sorted(due_s) == workload.poisson_times(4.0, 2000, seed=1)
        assert 2000 / due_s[-1] == pytest.approx(4.0, rel=0.1)


class TestChild:
    def test_reason_of_a_death(self):
        assert death_reason(-4, "") == "was killed by SIGILL: it is built for instructions that this CPU lacks"
        assert death_reason(-9, "x") == "was killed by SIGKILL"
        log = "Traceback (most recent call last):\n  File x\nImportError: libfoo.so:\n not found\n\nleaving"
        assert death_reason(1, log) == "ended with code 1: ImportError: libfoo.so:"
        assert death_reason(3, "") == "ended with code 3: it said nothing"

    def test_answers_errors_and_prints(self, tmp_path):
        child = start_child(tmp_path)
        try:
            assert child.ask("double", 30, value=21) == 42
            with pytest.raises(ChildFailed, match="^ValueError: no such thing$"):
                child.ask("fail", 30)
            assert child.ask("double", 30, value="ab") == "abab"
        finally:
            child.close()
        assert "printed\n" in (tmp_path / "log").read_text()

    def test_is_stopped_between_two_questions(self, tmp_path):
        child = start_child(tmp_path)
        try:
            child.ask("double", 30, value=1)
            state = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
            assert state == "T"
        finally:
            child.close()

    def test_a_death_is_told(self, tmp_path):
        child = start_child(tmp_path)
        try:
            with pytest.raises(ChildFailed, match="ended with code 7: SomeError: the reason"):
                child.ask("die", 30)
            with pytest.raises(ChildFailed, match="ended with code 7"):
                child.ask("double", 30, value=1)
        finally:
            child.close()

    def test_silence_is_told(self, tmp_path):
        child = start_child(tmp_path)
        try:
            with pytest.raises(ChildFailed, match="gave no answer to 'hang' in time"):
                child.ask("hang", 0.2)
        finally:
            child.close()


SERVED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from json_lines import serve

class Served:
    def double(self, value):
        print("printed")
        return value * 2
    def fail(self):
        raise ValueError("no such thing")
    def die(self):
        sys.stderr.write("SomeError: the reason\\n")
        os._exit(7)
    def hang(self):
        signal.pause()

serve(Served())
"""


def start_child(tmp_path: Path) -> Child:
    script = tmp_path / "served.py"
    script.write_text(SERVED)
    return Child([sys.executable, "-u", str(script), str(BENCHMARKS / "peers")], dict(os.environ), tmp_path / "log")


class TestModes:
    def test_flags_get_their_types(self):
        mode = parse_mode("fast one: dtype=bfloat16 --max-num-seqs=8 enable-prefix-caching=true watermark=0.1")
        assert mode == Mode("fast one", {"dtype": "bfloat16", "max_num_seqs": 8, "enable_prefix_caching": True, "watermark": 0.1})
        assert parse_mode("plain:") == Mode("plain", {})

    @pytest.mark.parametrize("text, message", [
        ("bf16", "allowed: 'NAME: key=value key=value'"), (": dtype=auto", "allowed: 'NAME:"), ("a: dtype", "allowed: 'NAME:"),
        ("new: no-such-flag=8", "new: this engine has no setting 'no_such_flag'; it has: .*dtype"),
        ("new: dtype=float8", "new: dtype: was 'float8'; allowed: auto, float32"),
        ("new: max-num-seqs=many", "new: FOLOVLLM_MAX_NUM_SEQS: was 'many'"),
    ])
    def test_what_is_wrong_is_said(self, text, message):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            parse_mode(text)

    def test_half_the_work_is_no_result(self):
        work = [([1, 2], 3), ([4], 5)]
        assert checked(Result(2.0, [3, 5], None), work).rate == 4.0
        with pytest.raises(NotRunning, match="gave 4 tokens for request 1 instead of 5"):
            checked(Result(2.0, [3, 4], None), work)


class TestPeers:
    def test_why_a_peer_does_not_run(self, tmp_path):
        openvino = PEERS["openvino"]
        assert openvino.why_not(None) == "no --peers DIR was given"
        assert "not installed in" in openvino.why_not(tmp_path)
        (tmp_path / "openvino").mkdir()
        (tmp_path / "openvino" / "installed").touch()
        assert openvino.why_not(tmp_path) is None
        assert PEERS["transformers"].why_not(None) is None

    def test_adapters_exist(self):
        for peer in PEERS.values():
            assert (BENCHMARKS / "peers" / peer.adapter).is_file()


class TestPercentiles:
    def test_of_one_stream(self):
        stream = Stream(1.0, [1.5, 1.6, 1.6, 1.6, 1.9])
        assert stream.ttft_s == 0.5
        assert stream.tpot_s == pytest.approx(0.1)
        assert stream.gaps_s() == pytest.approx([0.1, 0.3])
        assert Stream(0.0, [2.0]).tpot_s is None and Stream(0.0, [2.0]).gaps_s() == []

    def test_summary(self):
        streams = [Stream(float(i), [i + 0.001 * (i + 1), i + 0.001 * (i + 1) + 0.2]) for i in range(101)]
        found = summary_ms(streams)
        assert [round(found[f"TTFT p{q}"], 6) for q in (50, 90, 99)] == [51.0, 91.0, 100.0]
        assert found["TPOT p50"] == pytest.approx(200) and found["ITL p99"] == pytest.approx(200)
        assert tokens_per_s(streams) == pytest.approx(202 / 100.301)
        assert "TPOT p50" not in summary_ms([Stream(0.0, [2.0])])


class FakeEngine:
    """Writes down its turns; fails in its ``fails_at``th one."""

    is_ours, one_at_a_time = False, False

    def __init__(self, name: str, turns: list[str], fails_at: int | None = None) -> None:
        self.name, self._turns, self._fails_at, self.closed, self.loaded = name, turns, fails_at, False, 0

    def load(self, target, width, serving=False):
        self.loaded += 1
        return {"width": width}

    def run(self, work, one_by_one=False):
        self._turns.append(self.name)
        if self._turns.count(self.name) == self._fails_at:
            raise NotRunning("broke")
        return Result(2.0, [count for _, count in work], None)

    def pid(self):
        return None

    def close(self):
        self.closed = True


class TestSession:
    def make(self, tmp_path: Path, engines: list[FakeEngine], rounds: int) -> harness.Session:
        arguments = harness.parser("").parse_args(["--rounds", str(rounds), "--model", str(tmp_path), "--out", str(tmp_path)])
        report = harness.new_report("fake", "width", [RATE], arguments)
        return harness.Session(arguments, report, engines)

    def test_order_turns_round_and_warm_ups_do_not_count(self, tmp_path):
        turns: list[str] = []
        with self.make(tmp_path, [FakeEngine("a", turns), FakeEngine("b", turns)], rounds=3) as session:
            session.load(4, warm=False)
            session.alternate(4, lambda engine: {"rate": engine.run([([1], 6)]).rate}, warm_ups=1)
        assert turns == ["b", "a", "a", "b", "b", "a", "a", "b"]
        assert session.report.values(4, "a", "rate") == [3.0] * 3
        assert session.report.engines["a"]["width"] == 4

    def test_one_that_fails_is_named_and_the_others_go_on(self, tmp_path):
        turns: list[str] = []
        bad, good = FakeEngine("bad", turns, fails_at=2), FakeEngine("good", turns)
        with self.make(tmp_path, [bad, good], rounds=3) as session:
            session.load(4, warm=False)
            session.alternate(4, lambda engine: {"rate": engine.run([([1], 6)]).rate})
            assert bad.closed and not good.closed
        assert session.report.missing == {"bad": "at width 4: broke"}
        assert (len(session.report.values(4, "bad", "rate")), len(session.report.values(4, "good", "rate"))) == (1, 3)
        assert good.closed

    def test_decode_alone_is_without_the_prefills(self):
        class Engine:
            def run(self, work, one_by_one):
                assert one_by_one
                return Result(sum(1.0 + 0.1 * (count - 1) for _, count in work), [count for _, count in work], None)

        found = harness.whole_and_decode(Engine(), [([1, 2], 11), ([3], 21)], "whole", "decode")
        assert found == {"whole": pytest.approx(32 / 5), "decode": pytest.approx(10.0)}
        assert harness.positive("rate", 5, -0.1) == {}


def test_the_watch_keeps_what_it_saw_while_the_engines_ran(monkeypatch):
    """A peer's worker that is killed and waited for by nobody takes its time along."""
    own_s = iter([0.0, 9.0, 0.0])
    monkeypatch.setattr(machine, "machine_cpu_s", iter([100.0, 110.0, 120.0]).__next__)
    monkeypatch.setattr(machine, "tree_cpu_s", lambda pid: next(own_s))
    monkeypatch.setattr(machine.time, "monotonic", iter([0.0, 10.0, 20.0]).__next__)
    watch = machine.Watch()
    watch.end()
    assert watch.result()["others_cores"] == 0.1


def test_offline_throughput_is_workload_w_beside_transformers(tmp_path, monkeypatch):
    """All of W at once, three rounds that alternate, and its first 8 requests one by one for transformers."""
    turns, ran = [], []
    peer, ours = FakeEngine("transformers, one by one", turns), FakeEngine("bf16", turns)
    peer.one_at_a_time = True
    for engine in (peer, ours):
        def run(work, one_by_one=False, engine=engine):
            ran.append((engine.name, len(work), sum(count for _, count in work), one_by_one))
            return Result(1.0 if engine is ours else 2.0, [count for _, count in work], None)
        monkeypatch.setattr(engine, "run", run)
    monkeypatch.setattr(harness, "engines", lambda arguments: [peer, ours] if arguments.chosen == ["transformers"] else [])
    offline_throughput.main(["--model", str(tmp_path), "--out", str(tmp_path)])
    measured = [entry for entry in ran if entry[2] > 8]                  # without the warm-up of a load
    assert measured.count(("transformers, one by one", 8, 737, True)) == 3
    assert measured.count(("bf16", 64, 5088, False)) == 3 + 1            # one more to warm
    assert len(measured) == 7
    medians = json.loads((tmp_path / "offline_throughput.json").read_text())["medians"]
    assert [entry["median"] for entry in medians] == [737 / 2, 5088]


def test_the_prompts_are_twenty_of_three_kinds():
    names = [path.stem for path in sorted((BENCHMARKS / "prompts").glob("*.txt"))]
    assert len(names) == 20 and {name.split("_")[0] for name in names} == set(KINDS)
