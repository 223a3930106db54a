"""`interp conflict score`: a judge behind a server from end to end, what is said before anything is answered, what is kept."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conflict.chat_models import save_chat_model
from conflict.scripted_answers import LIST, script
from conflict.scripted_server import GOOD, RUBRIC, Scripted, completion, scores
from typer.testing import CliRunner

from interp import load_result
from interp.cli import app
from interp.cli_shared import load
from interp.conflict import answers as answering
from interp.conflict.api_judge import ApiJudge
from interp.errors import InputError, InterpError, ModelError, ResourceError

KEY = "sk-secret-90b2aa"
# Two pairs of prompts with three answers each, of which one is a list or two are, and the others are equal. The judge
# grades four at a time.
SOME = ["--family", "list", "--wording", "simple", "--pairs", 2]
N, DIFFERENT = 6, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "tiny-chat")


@pytest.fixture(autouse=True)
def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts were answered, chunk by chunk, by a script."""
    script(monkeypatch)
    scripted, counts = answering.answer_ids, []

    def counted(model: Any, encoded: Any, **options: Any) -> Any:
        counts.append(len(encoded))
        return scripted(model, encoded, **options)

    monkeypatch.setattr(answering, "answer_ids", counted)
    return counts


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where folders go that nobody named."""
    path = tmp_path / "temporary"
    path.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(path))
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    pytest.importorskip("openai")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    one = Scripted()
    one.script = [replies(GOOD)]
    yield one
    one.close()


def replies(good: Any, to_a_list: Any = None, rubric: Any = RUBRIC) -> Any:
    """Replies to requests for a rubric, for the scores of an answer, and for those of an answer that is a list."""

    def reply(body: dict[str, Any]) -> Any:
        if kind(body) == "rubric":
            return rubric
        return to_a_list if to_a_list is not None and f"<answer>\n{LIST}" in asked(body) else good

    return reply


def kind(body: dict[str, Any]) -> str:
    return body["response_format"]["json_schema"]["name"]


def asked(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


def graded(bodies: list[dict[str, Any]]) -> set[str]:
    """The different requests for scores."""
    return {asked(body) for body in bodies if kind(body) != "rubric"}


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, ["conflict", "score", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def parsed(result: Any) -> Any:
    return json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))


def failing(*arguments: Any) -> Any:
    """A run that is to end with an error of ours."""
    result = CliRunner().invoke(app, ["conflict", "score", *map(str, arguments)])
    assert result.exit_code == 1
    assert isinstance(result.exception, InterpError)
    return result


def api(server: Scripted, folder: Path, *more: Any) -> list[Any]:
    judge = ["--judge", "api", "--base-url", server.url, "--judge-model", "m", "--key-env", "JUDGE_KEY"]
    return [*SOME, "--model", folder, *judge, "--json", *more]


def test_good_replies(server: Scripted, folder: Path, tmp_path: Path, temporary: Path) -> None:
    found = parsed(run(*api(server, folder, "--judge", "rule", "--out", tmp_path / "run")))
    means = {(row["prompt"], row["what"]): row["mean"] for row in found["scores"] if row["judge"] == "api:m"}
    assert means["conflict", "cras"] == pytest.approx(3.25)
    assert means["system", "constraint_compliance"] == 1
    assert {row["first"] for row in found["agreement"]} | {row["second"] for row in found["agreement"]} == {
        "rule",
        "api:m",
    }
    assert len(graded(server.bodies)) == DIFFERENT
    assert {kind(body) for body in server.bodies} == {"rubric", "scores"}
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert len(load_result(tmp_path / "run" / "scores-api").frame) == 4 * N
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    # Without --out the same table, and nothing is left.
    assert parsed(run(*api(server, folder, "--judge", "rule"))) == found
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("named", [True, False], ids=["out", "no out"])
@pytest.mark.parametrize("bad", [scores(4, 9, 5, 1), completion("no")], ids=["9", "unreadable"])
def test_out_of_range_is_refused_and_can_be_dropped_without_asking_again(
    server: Scripted, folder: Path, tmp_path: Path, temporary: Path, answered: list[int], bad: Any, named: bool
) -> None:
    server.script = [replies(GOOD, bad)]
    place = ["--out", tmp_path / "run"] if named else []
    with pytest.raises(InputError, match=r"judge 'api:m' answered out of range: .*give --out-of-range drop") as caught:
        run(*api(server, folder, *place))
    assert f"All {4 * N} scores are kept" in str(caught.value)
    assert "=" not in str(caught.value)  # no argument of a function
    assert len(list(temporary.iterdir())) == (not named)
    if not named:
        found = re.search(r"Give --out (\S+) to go on", str(caught.value))
        assert found is not None
        place = ["--out", found[1]]
    n_requests, n_answered = len(server.bodies), sum(answered)
    rows = parsed(run(*api(server, folder, *place, "--out-of-range", "drop")))["scores"]
    assert (len(server.bodies), sum(answered)) == (n_requests, n_answered)
    by_prompt = {row["prompt"]: (row["n"], row["n_dropped"]) for row in rows if row["what"] == "cras"}
    assert {sum(counts) for counts in by_prompt.values()} == {2}
    assert sum(dropped for _, dropped in by_prompt.values()) >= 1
    assert sum(kept for kept, _ in by_prompt.values()) >= 1


def test_when_all_answers_are_dropped_the_rest_is_still_said(server: Scripted, folder: Path) -> None:
    server.script = [replies(scores(0, 0, 0, 0))]
    result = run(*api(server, folder, "--judge", "rule", "--out-of-range", "drop"))
    rows = parsed(result)["scores"]
    assert {(row["n"], row["n_dropped"]) for row in rows if row["judge"] == "api:m"} == {(0, 2)}
    assert all(row["mean"] is None for row in rows if row["judge"] == "api:m")
    assert any(row["mean"] for row in rows if row["judge"] == "rule")
    assert "agreement" not in parsed(result)
    assert "no agreement: judges 'api:m' and 'rule' have no answer in common" in result.stderr


def test_a_judge_without_answers_does_not_hide_how_the_others_agree(
    server: Scripted, folder: Path, tmp_path: Path
) -> None:
    server.script = [replies(scores(0, 0, 0, 0))]
    three = api(server, folder, "--judge", "rule", "--judge", "local", "--out", tmp_path / "run")
    result = run(*three, "--out-of-range", "drop")
    others = {"rule", "local:tiny-chat"}
    assert {(row["first"], row["second"]) for row in parsed(result)["agreement"]} == {("rule", "local:tiny-chat")}
    for other in others:
        assert f"no agreement: judges 'api:m' and '{other}' have no answer in common" in result.stderr
    # Where it is refused, what is known of the others is printed before.
    refused = failing(*three)
    message = str(refused.exception)
    assert re.search(r"^judge 'api:m' answered out of range: .*give --out-of-range drop", message)
    assert f"All {3 * 4 * N} scores are kept" in message
    assert {row["judge"] for row in parsed(refused)["scores"]} == others
    assert parsed(refused)["agreement"] == parsed(result)["agreement"]
    assert "no agreement" not in refused.stderr
    # With nobody in range there is nothing to print.
    assert "{" not in failing(*api(server, folder, "--out", tmp_path / "run")).stdout


def test_other_weights_ask_nothing_again(server: Scripted, folder: Path, tmp_path: Path, answered: list[int]) -> None:
    def reply(body: dict[str, Any]) -> Any:
        """The rules' verdict on the constraint, and its opposite on the role."""
        if kind(body) == "rubric":
            return RUBRIC
        keeps = ("must be a numbered list" in asked(body)) == (f"<answer>\n{LIST}" in asked(body))
        return scores(4, 1, 5, 5) if keeps else scores(4, 5, 5, 1)

    server.script = [reply]
    here = api(server, folder, "--judge", "rule", "--out", tmp_path / "run")
    even = parsed(run(*here))
    n_requests, n_answered = len(server.bodies), sum(answered)
    assert even["agreement"][0]["what"] == "cras"
    assert even["agreement"][0]["kappa"] == pytest.approx(0)
    for name, kappa in (("role_consistency", -1), ("constraint_compliance", 1)):
        found = parsed(run(*here, "--weight", f"{name}=1"))
        rows = {row["what"]: row for row in found["agreement"]}
        assert rows["cras"] == rows[name] | {"what": "cras"}
        assert kappa * rows["cras"]["kappa"] > 0.5
        means = {(row["judge"], row["prompt"], row["what"]): row["mean"] for row in found["scores"]}
        assert all(means[judge, "conflict", "cras"] == means[judge, "conflict", name] for judge in ("api:m", "rule"))
    assert parsed(run(*here)) == even
    assert (len(server.bodies), sum(answered)) == (n_requests, n_answered)


def test_a_server_and_a_local_judge_have_models_of_their_own(
    server: Scripted, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other-chat"
    shutil.copytree(folder, other)
    loaded: list[str] = []
    monkeypatch.setattr("interp.cli_conflict_score.load", lambda name, *_: loaded.append(name) or load(name, *_))

    def judges(*arguments: Any) -> set[str]:
        return {row["judge"] for row in parsed(run(*arguments))["scores"]}

    both = api(server, folder, "--judge", "local", "--out", tmp_path / "run")
    assert judges(*both) == {"api:m", "local:tiny-chat"}  # the model that answers
    both[-1] = tmp_path / "run of two"
    assert judges(*both, "--local-model", other) == {"api:m", "local:other-chat"}
    assert loaded == [str(folder), str(folder), str(other)]
    assert {body["model"] for body in server.bodies} == {"m"}
    # A local judge without a server takes either name.
    local = ["--answers", tmp_path / "run" / "answers", "--judge", "local", "--json"]
    for option in ("--judge-model", "--local-model"):
        loaded.clear()
        assert judges(*local, option, other) == {"local:other-chat"}
        assert loaded == [str(other)]
    with pytest.raises(InputError, match="--judge-model and --local-model both name the local judge's model"):
        run(*local, "--judge-model", other, "--local-model", folder)


def test_a_server_that_fails_loses_nothing(
    server: Scripted, folder: Path, temporary: Path, answered: list[int]
) -> None:
    paid: set[str] = set()

    def closes(body: dict[str, Any]) -> Any:
        if kind(body) != "rubric" and len(paid) == 3 and asked(body) not in paid:
            return 403, {"error": {"message": "no money"}}
        paid.update(graded([body]))
        return replies(GOOD)(body)

    server.script = [closes]
    with pytest.raises(ResourceError, match=r"no money.*4 of 6 answers are graded and kept") as caught:
        run(*api(server, folder))
    (place,) = temporary.iterdir()
    assert f"Give --out {place} to go on from what was answered and graded" in str(caught.value)
    assert "run the same again" not in str(caught.value)  # that would begin anew
    with pytest.raises(ResourceError, match=r"kept in scores-api; run the same again to go on$"):
        run(*api(server, folder, "--out", place))
    server.script = [replies(GOOD)]
    n_requests, n_answered = len(server.bodies), sum(answered)
    assert parsed(run(*api(server, folder, "--out", place)))["scores"]
    assert {kind(body) for body in server.bodies[n_requests:]} == {"scores"}
    assert graded(server.bodies[n_requests:]) == graded(server.bodies) - paid  # what was paid for is not asked again
    assert len(paid) == 3
    assert sum(answered) == n_answered


def test_an_interrupted_run_says_where_its_answers_are(
    server: Scripted, folder: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(ApiJudge, "scores", interrupted)
    result = CliRunner().invoke(app, ["conflict", "score", *map(str, api(server, folder))])
    assert result.exit_code != 0
    (place,) = temporary.iterdir()
    assert f"interp: Give --out {place} to go on from what was answered and graded" in result.stderr
    assert len(load_result(place / "answers").frame) == N


def test_rubrics(server: Scripted, folder: Path, tmp_path: Path) -> None:
    server.script = [replies(GOOD, rubric=completion("{}"))]
    out = ["--out", tmp_path / "run"]
    with pytest.raises(ModelError, match=r"wrote no rubric in 3 replies .*; give --rubric template for the fixed one"):
        run(*api(server, folder, *out))
    n_requests = len(server.bodies)
    assert parsed(run(*api(server, folder, *out, "--rubric", "template")))["scores"]  # in the same folder
    assert {kind(body) for body in server.bodies[n_requests:]} == {"scores"}
    assert len(graded(server.bodies)) == DIFFERENT
    server.script = [replies(GOOD)]
    assert parsed(run(*api(server, folder, *out, "--rubric", "written")))["scores"]
    written, fixed = (
        load_result(tmp_path / "run" / name).frame["rubric"] for name in ("scores-api", "scores-api-template")
    )
    assert written.iloc[0] == "\n".join(f"{at}: goal_alignment {at}" for at in range(1, 6))
    assert "does exactly and fully what the task asks for" in fixed.iloc[0]


def test_a_server_that_wants_no_key(server: Scripted, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert parsed(run(*api(server, folder, "--key-env", "none", "--rubric", "template")))["scores"]
    assert set(server.keys) == {"Bearer none"}
    assert len(graded(server.bodies)) == DIFFERENT


WRONG = [
    (["--by", "wrong"], "--by 'wrong'; expected some of family, system_rule, user_rule, prompt, setting"),
    (["--weight", "wrong=1"], "--weight: weights have 'wrong'; the dimensions are goal_alignment"),
    (["--weight", "goal_alignment=0.4"], "--weight: weights .* of sum 0.4"),
    (["--out-of-range", "clip"], "--out-of-range 'clip'; expected refuse or drop"),
    (["--rubric", "free"], "--rubric 'free'; expected template or written"),
    (["--template", "none.jinja"], "--template 'none.jinja'; expected chatml, plain or a file"),
    (["--part", "middle"], "part='middle'"),
]
WRONG_API = [
    (["--key-env", "NO_SUCH_KEY"], r"variable NO_SUCH_KEY is not set.* or give --key-env none for a server that wants"),
    (["--base-url", "nowhere"], "^--base-url 'nowhere'; expected an address"),
    (
        ["--base-url", "http://me:word@127.0.0.1/v1"],
        "^--base-url holds .* put the key into an environment variable and name that with --key-env$",
    ),
    (["--judge-model", " "], "--judge api needs --base-url, .* and --judge-model"),
    (["--local-model", "m"], "--local-model is the model of --judge local; add that"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG + WRONG_API)
def test_before_anything_is_answered_or_graded(
    server: Scripted,
    folder: Path,
    temporary: Path,
    answered: list[int],
    monkeypatch: pytest.MonkeyPatch,
    wrong: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("interp.cli_conflict_score.load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(InterpError, match=message):
        run(*api(server, folder, *wrong))
    assert not answered
    assert not server.bodies
    assert not list(temporary.iterdir())


def test_openai_is_missed_before_anything_is_answered(
    server: Scripted, folder: Path, answered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'interp\[judge\]'"):
        run(*api(server, folder))
    assert not answered


def test_judges_on_this_machine(folder: Path, temporary: Path) -> None:
    here = [*SOME, "--model", folder, "--json"]
    found = parsed(run(*here, "--by", "family", "--by", "prompt", "--by", "family"))
    assert {(row["family"], row["prompt"]) for row in found["scores"]} == {
        ("list", prompt) for prompt in ("system", "agree", "conflict")
    }
    with pytest.raises(InputError, match="--rubric is not used by --judge rule"):
        run(*here, "--rubric", "template")
    assert not list(temporary.iterdir())


def test_no_place_for_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(ResourceError, match=r"no folder for answers and scores: .*; name one with --out"):
        run(*SOME, "--model", folder)
    assert parsed(run(*SOME, "--model", folder, "--json", "--out", tmp_path / "run"))["scores"]


def test_what_fails_before_an_answer_leaves_nothing(tmp_path: Path, temporary: Path) -> None:
    save_chat_model(tmp_path / "plain", None)
    with pytest.raises(InputError, match="has no chat template") as caught:
        run(*SOME, "--model", tmp_path / "plain")
    assert "--out" not in str(caught.value)
    assert not list(temporary.iterdir())
