"""One run of a question's checks over one set of answers.

The same text of checks runs in a learner's notebook, in nbgrader and in the safe judge. It reaches the answers through ``Trial.call`` and
``Trial.get`` alone, so it does not see whether they lie in the same process (``Local``) or in a box at the other end of a pipe: arguments and
results are plain values, copied on the way.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import reprlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

NUMERIC = "biufc"  # the kinds of numpy arrays that pass
SIMPLE = (bool, int, float, complex, str, bytes, type(None))


class GraderError(Exception):
    """The grading itself failed (no box, no memory): no fault of the learner's, so no part swallows it."""


class AnswerError(Exception):
    """An answer that cannot be judged, or is wrong; its text is what the learner reads, ``got`` and ``want`` what the lecturer sees beside."""

    got = want = ""


class Missing(AnswerError):
    def __init__(self, name: str, problem: str = "is not defined"):
        super().__init__(f"`{name}` {problem}")


class StudentError(AnswerError):
    """The learner's function raised: the exception's type, its message, and the line where (as text)."""

    def __init__(self, type: str, message: str = "", line: str = ""):
        super().__init__(f"raised {type}" + (f": {message[:200]}" if message else "") + (f" ({line})" if line else ""))
        self.type, self.message, self.line = type, message, line


class TimedOut(AnswerError):
    def __init__(self, seconds: float):
        super().__init__(f"too slow: no answer within {seconds:g} s")


class NotPlain(AnswerError):
    def __init__(self, what: str):
        super().__init__(f"returned {what}, where an array, a number, a text, a list or a dict was expected")


class Mismatch(AnswerError):
    """What came out is not what was expected; ``got`` and ``want`` are shown for visible checks only."""

    def __init__(self, reason: str, got: Any, want: Any):
        super().__init__(reason)
        self.got, self.want = show(got), show(want)


@dataclass
class Part:
    """One property that was tried. ``says`` and ``reason`` are for the learner's eyes; ``tried``, ``got``, ``want`` for visible checks alone."""

    says: str
    weight: float = 1
    ok: bool = False
    reason: str = ""
    tried: str = ""
    got: str = ""
    want: str = ""


class Answers(Protocol):
    """Where a learner's answers lie. ``call`` and ``get`` return plain values or raise an ``AnswerError``."""

    def call(self, name: str, args: tuple, kwargs: dict) -> Any: ...
    def get(self, name: str) -> Any: ...
    def names(self) -> list[str]: ...
    def afresh(self) -> None: ...


class Local:
    """Answers in a namespace of this process: what ``check`` and nbgrader's own autograde see."""

    def __init__(self, namespace: dict[str, Any]):
        self.namespace = namespace

    def afresh(self) -> None:
        """Nothing: a namespace cannot be run anew."""

    def names(self) -> list[str]:
        return [name for name in self.namespace if not name.startswith("_")]

    def get(self, name: str) -> Any:
        return plain(self._find(name))

    def call(self, name: str, args: tuple, kwargs: dict) -> Any:
        function = self._find(name)
        if not callable(function):
            raise Missing(name, "is not a function")
        args, kwargs = each(args, _copied), each(kwargs, _copied)
        try:
            result = function(*args, **kwargs)
        except (Exception, SystemExit) as error:
            raise StudentError(type(error).__name__, str(error), _line(error)) from error
        return plain(result)

    def _find(self, name: str) -> Any:
        if name not in self.namespace:
            raise Missing(name)
        return self.namespace[name]


class Trial:
    """A question's checks over one learner's answers.

    ``rng`` is the only source of chance. ``parts`` are what was tried so far, ``figures`` what was measured for a leaderboard (smaller is better).
    Everything outside of ``with t.part(...)`` is trusted code and must not call the learner's.
    """

    def __init__(self, question: str, answers: Answers, student: str = "", seed: int | None = None):
        self.question, self.answers, self.student = question, answers, student
        self.rng = np.random.default_rng(int.from_bytes(os.urandom(8)) if seed is None else seed)
        self.parts: list[Part] = []
        self.figures: dict[str, float] = {}
        self._tried, self._got = "", ""

    def draw(self, low: int, high: int) -> int:
        """A whole number from ``low`` to below ``high``."""
        return int(self.rng.integers(low, high))

    def variant(self) -> dict[str, Any]:
        """The learner's own numbers for this question."""
        from .variants import variant

        return variant(self.student, self.question)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Run the learner's function now; what it returns, as plain values."""
        words = [show(a) for a in args] + [f"{key}={show(value)}" for key, value in kwargs.items()]
        self._tried, self._got = f"{name}({', '.join(words)})", ""
        result = self.answers.call(name, args, kwargs)
        self._got = show(result)
        return result

    def get(self, name: str) -> Any:
        """A value that the learner's notebook defines, as plain values."""
        self._tried, self._got = name, ""
        result = self.answers.get(name)
        self._got = show(result)
        return result

    def afresh(self) -> None:
        """Run the learner's notebook anew in the judge: what a call left behind, in globals or files, is gone."""
        self.answers.afresh()

    def tensor(self, array: Any) -> Any:
        """An argument that the learner's function gets as a torch tensor."""
        import torch

        return torch.as_tensor(array)

    def close(self, got: Any, want: Any, rtol: float = 1e-6, atol: float = 1e-8, mistakes: dict[str, Any] | None = None) -> None:
        """Nothing where ``got`` is ``want`` up to rounding, else ``Mismatch``. ``mistakes``: {what was done wrong: what comes out then}."""
        if reason := difference(got, want, rtol, atol):
            known = (fault for fault, outcome in (mistakes or {}).items() if not difference(got, outcome, rtol, atol))
            raise Mismatch(next(known, reason), got, want)

    def equal(self, got: Any, want: Any, mistakes: dict[str, Any] | None = None) -> None:
        """As ``close``, to the last digit."""
        self.close(got, want, 0, 0, mistakes)

    def figure(self, name: str, value: float) -> None:
        """Record a measured figure for the leaderboard; smaller is better."""
        self.figures[name] = float(value)

    @contextlib.contextmanager
    def part(self, says: str, weight: float = 1) -> Iterator[Part]:
        """One property: whatever fails inside loses this part alone. ``says`` names it and gives away neither input nor answer."""
        part = Part(says, weight)
        self.parts.append(part)
        self._tried, self._got = "", ""
        try:
            yield part
            part.ok = True
        except GraderError:
            raise
        except AnswerError as error:
            part.reason, part.got, part.want = str(error), error.got or self._got, error.want
        except AssertionError as error:
            part.reason, part.got = str(error).partition("\n")[0] or "this does not hold", self._got
        except Exception as error:  # a value of another shape or type than the check reckons with
            part.reason, part.got = f"what came out does not fit ({type(error).__name__})", self._got
        part.tried = self._tried

    def score(self, points: float) -> float:
        """The points earned: of ``points``, the share of the weights of the parts that hold."""
        if not self.parts:
            raise GraderError(f"question {self.question} has no part")
        return points * sum(p.weight for p in self.parts if p.ok) / sum(p.weight for p in self.parts)


@dataclass(frozen=True)
class _Judging:
    answers: Answers
    student: str
    seed: int | None


_JUDGING: ContextVar[_Judging | None] = ContextVar("judging", default=None)


@contextlib.contextmanager
def judging(answers: Answers, student: str, seed: int | None = None) -> Iterator[None]:
    """While this holds, ``trial`` asks these answers, whatever namespace it is given. ``seed=None``: fresh inputs each time."""
    token = _JUDGING.set(_Judging(answers, student, seed))
    try:
        yield
    finally:
        _JUDGING.reset(token)


def trial(question: str, namespace: dict[str, Any]) -> Trial:
    """The trial of a question that hidden checks begin with: over the judge's answers, or over ``namespace`` where there is no judge."""
    judge = _JUDGING.get() or _Judging(Local(namespace), str(namespace.get("student", "")), None)
    return Trial(question, judge.answers, judge.student, judge.seed)


def each(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """``leaf`` of every value inside nested lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(each(v, leaf) for v in value)
    if isinstance(value, dict):
        return {key: each(v, leaf) for key, v in value.items()}
    return leaf(value)


def _copied(value: Any) -> Any:
    """Arrays and tensors copied, so that a function that writes into its arguments does not change the check's."""
    if isinstance(value, np.ndarray):
        return value.copy()
    return value.clone() if _is_tensor(value) else value


def plain(value: Any) -> Any:
    """A result as it would come out of a pipe: tensors as arrays, numpy's scalars as numbers. ``NotPlain`` for anything that is not data."""
    return each(value, _plain_leaf)


def _plain_leaf(value: Any) -> Any:
    if _is_tensor(value):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray) and value.dtype.kind in NUMERIC:
        return np.array(value)
    if type(value) in SIMPLE:
        return value
    raise NotPlain("an array of objects" if isinstance(value, np.ndarray) else f"a {type(value).__name__}")


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # no tensor exists before somebody has imported torch
    return torch is not None and isinstance(value, torch.Tensor)


def difference(got: Any, want: Any, rtol: float = 0, atol: float = 0) -> str:
    """How ``got`` differs from ``want``, in words that give away neither; empty where it does not. Numbers may come as list, tuple or array."""
    if isinstance(want, dict):
        if not isinstance(got, dict):
            return f"{_kind(got)} where a dict was expected"
        if got.keys() != want.keys():
            return "other keys than expected"
        pairs = [(f"[{key!r}]", got[key], want[key]) for key in want]
    elif isinstance(want, (list, tuple)) and any(isinstance(w, (list, tuple, dict, str, bytes, np.ndarray)) for w in want):
        if not isinstance(got, (list, tuple, np.ndarray)) or len(got) != len(want):
            return f"{_kind(got)} where {len(want)} values were expected"
        pairs = [(f"[{i}]", g, w) for i, (g, w) in enumerate(zip(got, want))]
    elif isinstance(want, (str, bytes, type(None))):
        return "" if type(got) is type(want) and got == want else "wrong value" if type(got) is type(want) else f"{_kind(got)} was not expected"
    else:
        return _numbers_differ(got, np.asarray(want), rtol, atol)
    return next((f"{place}: {reason}" for place, g, w in pairs if (reason := difference(g, w, rtol, atol))), "")


def _numbers_differ(got: Any, want: np.ndarray, rtol: float, atol: float) -> str:
    try:
        found = np.asarray(got)
    except ValueError:  # rows of unequal length
        return "rows of unequal length"
    if found.dtype.kind not in NUMERIC:
        return f"{_kind(got)} where {'numbers were' if want.ndim else 'a number was'} expected"
    if found.shape != want.shape:
        return f"wrong shape: {_shape(found.shape)} where {_shape(want.shape)} was expected"
    if found.dtype.kind != "b" and np.isnan(found).any() and not np.isnan(want).any():
        return "not a number (nan)"
    same = np.isclose(found, want, rtol, atol, equal_nan=True)
    wrong = same.size - int(np.count_nonzero(same))
    return "" if not wrong else f"wrong values: {wrong} of {same.size}" if want.ndim else "wrong value"


def _shape(shape: tuple[int, ...]) -> str:
    return str(shape) if shape else "one number"


def _kind(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"{len(value)} values"
    names = {str: "a text", bytes: "bytes", type(None): "nothing (None)", dict: "a dict", np.ndarray: "an array"}
    return names.get(type(value), "a number")


_SHORT = reprlib.Repr()
_SHORT.maxother = _SHORT.maxstring = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8


def show(value: Any) -> str:
    """A value in a line or few, long ones cut."""
    if _is_tensor(value):
        return f"tensor({show(value.detach().cpu().numpy())})"
    if isinstance(value, np.ndarray):
        text = np.array2string(value, threshold=24, edgeitems=2, precision=6, separator=", ")
        return text if value.size <= 24 else f"{text} of shape {value.shape}"
    if isinstance(value, (list, tuple)) and any(isinstance(v, np.ndarray) or _is_tensor(v) for v in value):
        return "[" + ", ".join(show(v) for v in value[:8]) + (", …" if len(value) > 8 else "") + "]"
    if isinstance(value, dict) and any(isinstance(v, np.ndarray) or _is_tensor(v) for v in value.values()):
        few = list(value.items())[:8]
        return "{" + ", ".join(f"{key!r}: {show(v)}" for key, v in few) + (", …" if len(value) > 8 else "") + "}"
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return _SHORT.repr(value)


def one_line(text: Any) -> str:
    """What a submission says, cut, as one line without characters that a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in str(text)[:500])


def _line(error: BaseException) -> str:
    """Where the learner's function raised: the first frame below ours."""
    where = error.__traceback__.tb_next if error.__traceback__ else None
    if where is None:
        return ""
    text = linecache.getline(where.tb_frame.f_code.co_filename, where.tb_lineno).strip()
    return f"line {where.tb_lineno}" + (f": {text[:100]}" if text else "")
