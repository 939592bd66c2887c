"""Draws inside a step are the draws of ops.sample, whoever else is drawn for; rows nobody draws for are left out."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from headrace.config import SamplingParams
from headrace.engine.sampler import Row, Sampler
from headrace.errors import HeadraceError, NotFiniteError
from headrace.kernels.cpu import _native as native
from headrace.kernels.cpu.arrays import program_input
from headrace.ops.sampling import sample

ROWS, VOCAB = 4, 500


@dataclass
class Answer:
    params: SamplingParams
    seed: int
    prompt_ids: list[int] = field(default_factory=lambda: [3, 7, 7])
    token_ids: list[int] = field(default_factory=list)
    edits: tuple[()] = ()
    error: HeadraceError | None = None

    def fail(self, error):
        self.error = error


@pytest.fixture
def drawing():
    """Logits, and what draws from them for some answers."""
    logits = np.random.default_rng(0).standard_normal((ROWS, VOCAB)).astype(np.float32)
    program = native.Program(native.Pool(2), native.Sizes(1, 1, ROWS))
    sampler = Sampler(program_input(logits, program, "outputs"))
    program.finish()

    def draw(*answers, rows=None):
        drawn_for = [answer if isinstance(answer, Row) else Row(answer) for answer in answers]
        sampler.prepare(drawn_for)
        program.run(native.Sizes(1, 1, len(answers) if rows is None else rows))
        return sampler.drawn(logits, drawn_for)

    return logits, draw


def alone(row, answer):
    histories = {"prompt_ids": [answer.prompt_ids], "answer_ids": [answer.token_ids]}
    return int(sample(row[None], [answer.params], seeds=[answer.seed], steps=[len(answer.token_ids)], **histories)[0])


def test_draws_are_those_of_each_alone(drawing):
    logits, draw = drawing
    answers = [
        Answer(SamplingParams(temperature=0), 1),
        Answer(SamplingParams(temperature=2.0), 2),
        Answer(SamplingParams(temperature=3.0, repetition_penalty=1.5, presence_penalty=2.0), 3),
        Answer(SamplingParams(temperature=1.5, top_k=50, top_p=0.9), 4),
    ]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 1], [1]) * 3:
        chosen = [answers[i] for i in order]
        expected = [alone(logits[row], answer) for row, answer in enumerate(chosen)]
        assert draw(*chosen) == expected
        for answer, token in zip(chosen, expected, strict=True):
            answer.token_ids.append(token)
    assert len(set(answers[1].token_ids)) > 1  # every step draws anew


def test_behind_guesses_the_draw_is_the_one_due_there(drawing):
    logits, draw = drawing
    for params in (SamplingParams(temperature=3.0), SamplingParams(temperature=3.0, presence_penalty=2.0)):
        answer = Answer(params, 5, token_ids=[8])
        rows = [Row(answer, (9, 4)[:count]) for count in range(3)]
        later = [Answer(params, 5, token_ids=row.answer_ids) for row in rows]
        assert draw(*rows) == [alone(logits[place], answer) for place, answer in enumerate(later)]


def test_rows_that_nobody_draws_for_are_not_looked_at(drawing):
    logits, draw = drawing
    logits[1] = np.nan
    assert draw(Answer(SamplingParams(temperature=0), 0), rows=2) == [int(np.argmax(logits[0]))]
    assert draw(rows=ROWS) == []


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 1.0}, {"presence_penalty": 1.0}])
def test_a_row_that_is_not_finite_fails_alone(drawing, params, bad):
    logits, draw = drawing
    answers = [Answer(SamplingParams(**params), seed) for seed in range(ROWS)]
    expected = [alone(row, answer) for row, answer in zip(logits, answers, strict=True)]
    logits[1, slice(None) if bad < 0 else 9] = bad
    found = draw(*answers)
    assert [found[i] for i in (0, 2, 3)] == [expected[i] for i in (0, 2, 3)]
    assert [type(answer.error) for answer in answers] == [type(None), NotFiniteError, type(None), type(None)]
