"""What is read as a verdict and what is not. A wrong verdict is worse than none: none is asked for once more."""

import pytest

from syntriever.llm.replies import Reply, ended, judged, without_thoughts
from syntriever.llm.verdicts import parse_verdict

YES_NO, PAIR = ("yes", "no"), ("1", "2", "tie")

# What the line says, and what is read.
YES = """yes|YES.|Yes!|Yes!!|"yes"|“Yes”|'yes'|**Yes**|`yes`|(yes)|Yes, it is.|Yes, it does|
Yes. The passage correctly addresses the question.|Yes – it does|Yes - it does|Yes: it is correct|Answer: yes|Answer:yes|
**Answer:** Yes|**Answer**: yes|Final answer: yes|The answer is yes.|The final answer is: yes|My verdict is yes|
So, the answer is yes|Verdict = yes|It is a yes.|\\boxed{yes}|$\\boxed{yes}$|The answer is \\boxed{\\text{yes}}.|
{"verdict": "yes"}|{"verdict":"Yes."}|{"reason": "No doubt, not one.", "verdict": "yes"}"""
YES_LINES = [
    "```\nyes\n```",
    "```text\nYes.\n```",
    '```json\n{"verdict": "yes"}\n```',
    "### Answer\nyes",
    "Final answer:\n\n**yes**",
]
YES_LINES += ["Yes\nIt does.", "The passage is accurate.\n\nAnswer: yes", "It explains the topic. Final answer: Yes."]
NO = """no|No.|NO|No!|Final answer: no|No, it is not.|No, it isn't.|No, it doesn’t.|
No, the passage does not address the question.|No. It is incorrect.|No, not correct|Verdict: NO|**Verdict:** no|(no)|
\\boxed{no}|Answer - no|Answer -> no"""
NO_LINES = ["The passage does not address it.\nAnswer: no", "```\nno\n```", "No\n\nIt does not."]
FIRST = """1|1.|1!| 1 |"1"|**1**|`1`|(1)|[1]|[[1]]|{1}|<1>|1)|#1|Passage 1|passage 1.|Passage #1|Passage: 1|Option 1|
**Passage 1**|Answer: 1|Answer: Passage 1|Answer: (1)|Final answer: 1|The answer is 1.|The answer is passage 1|
Better passage: 1|The better passage is 1|The winner is passage 1.|Verdict: passage 1|The best choice is 1|\\boxed{1}|
The answer is $\\boxed{1}$.|{"verdict": "1"}| {"verdict": "1", "reason": "2 is worse"}|{"verdict": "1", "why": ""}"""
FIRST_LINES = ["#### 1", "Final answer:\n\n**1**", '```json\n{"verdict": "1"}\n```', "Passage\n1", "```\nPassage 1\n```"]
TIE = """tie|TIE.|**Verdict:** tie|Answer: tie|It's a tie.|The verdict is a tie.|Tie, neither is better.|
Tie: both are equally relevant|{"verdict":"TIE"}"""

NOT_YES_NO = """|yes and no|Yes or no|yes no|yes/no|no yes|not yes|not no|maybe|maybe yes|Maybe. Yes|probably yes|yes?|Yes...|
Yes…|yes and|Yes,|Yes:|yes –|Yes (mostly)|Yes, but not fully|Yes, partially|Yes, however it errs|Yes, if|Yes, it is not|
Yes, it is not correct.|Yes, wait, no|Yes, nothing is wrong|Yes it seems|Yes is not the answer|No, it is not yes|No, yes|
No, it is.|No, it is correct.|No, it is not wrong|No, it is not incorrect|No, I cannot find any errors|No errors|
No problem, it is correct|No doubt.|No doubt, yes|No. 1|no longer|No one knows|No-one|nope|yep|Yess|true|y|1|Answer:|
Answer: not yes|Answer: maybe yes|Answer: probably no|Answer: yes or no|Answer: yes? No.|Answer: yesterday|
The answer is not yes|The answer isn't yes|The answer is yes and no|The wrong answer is yes|Not sure. Answer: maybe|
I am not sure if it is right. Answer: yes|It is unclear. Answer: yes|The passage does not address it. Answer: yes|
Is it right? Answer: yes|There are no errors. Answer: yes|It could be better. Answer: no|
Answer with exactly one word and nothing else: yes or no.|~~yes~~ no|\\boxed{yes} \\boxed{no}|\\boxed{yes or no}|
{"verdict": "yes", "final_verdict": "no"}|{"verdict": "yes or no"}|{"verdict": "yes", "answer": "no"}|{"verdict": true}|
Neither yes nor no|I would say yes|It seems so|Yes, it is, is it not?|Yes. No.|Yes and it is|no, no, no|
The passage is correct"""
NOT_PAIR = """|12|21|0|3|10|one|first|1, because|1 because|Passage 1 is better|Passage 1 is better than passage 2|
Passage 1, not 2|1 or 2|1 and 2|1/2|1-2|1,2|1 2|1 > 2|1 = better|1: better; 2: worse|1 (2 is worse)|1.5|1?|1...|1:|1,|1st|-1|
- 1|+1|Answer: -1|#12|Passage 12|Passage 3|Passage 1:|Passages 1 and 2|2 passages|1. I think 2|1. Passage 1|
1. The first passage|probably 1|Not 1|maybe 1|neither|both|tied|not a tie|tie game|ties|Tie, but 1 is better|
Tie between 1 and 2|Tie, one is better|The worse passage is 1|The losing passage: 2|Passage 1 is good. Answer: 2|Answer: 1 or 2|
Answer: not 2|Answer 2|Answer: 1, 2|No. 2|Score: 1|１|yes|1️⃣|\\boxed{1} or \\boxed{2}|{"verdict": 1}|{"verdict": null}|
{"verdict": "3"}|{"Verdict": "1"}|{"answer": "1"}|["1"]|{}|{"verdict": "1"|{"verdict": "1"} 2|{"verdict": "1"}{"verdict": "1"}|
{"verdict": ["1"]}|{"verdict": "1", "verdict": "2"}|{"verdict": "1", "verdict": "1"}|{"verdict": {"verdict": "1"}}|
{"verdict": "1 or 2"}|{"verdict": "Answer: 1"}"""
NOT_PAIR_LINES = [
    "2\n1",
    "2.\n1.",
    "1\n2\ntie",
    "tie\ntie",
    "1\nPassage 2 is worse",
    "Passage 1 is good.\nAnswer: 2",
    '{"a":' * 5000,
]
NOT_YES_NO_LINES = [
    "yes\nno",
    "Answer: yes\nAnswer: no",
    "```\nyes\n```\n```\nno\n```",
    "No\nwait, it is correct",
    "The format is:\nAnswer: yes",
]


def told(table, *lines):
    return [*table.replace("|\n", "|").split("|"), *lines]


READ = [(text, YES_NO, "yes") for text in told(YES, *YES_LINES)] + [(text, YES_NO, "no") for text in told(NO, *NO_LINES)]
READ += [(text, PAIR, "1") for text in told(FIRST, *FIRST_LINES)] + [(text, PAIR, "tie") for text in told(TIE)]
REFUSED = [(text, YES_NO) for text in told(NOT_YES_NO, *NOT_YES_NO_LINES)] + [
    (text, PAIR) for text in told(NOT_PAIR, *NOT_PAIR_LINES)
]


def test_what_is_clear_is_read():
    assert len(READ) > 80
    assert [(text, found) for text, choices, verdict in READ if (found := parse_verdict(text, choices)) != verdict] == []
    twos = [(text.replace("1", "2"), "2") for text, choices, verdict in READ if verdict == "1" and "2" not in text]
    assert [(text, found) for text, verdict in twos if (found := parse_verdict(text, PAIR)) != verdict] == []


def test_what_is_not_clear_is_never_guessed():
    assert len(REFUSED) > 150
    assert [(text[:60], found) for text, choices in REFUSED if (found := parse_verdict(text, choices))] == []


@pytest.mark.parametrize("word", ["and", "or", "but", "not", "maybe", "rather", "then", "vs"])
def test_two_choices_are_none(word):
    for a, b in (("yes", "no"), ("1", "2"), ("2", "tie")):
        choices = YES_NO if a == "yes" else PAIR
        for text in (
            f"{a} {word} {b}",
            f"{a}, {word} {b}",
            f"{a}. {word} {b}",
            f"{word} {a}",
            f"Answer: {a} {word} {b}",
            f"{a}\n{word} {b}",
        ):
            assert parse_verdict(text, choices) is None, text


def test_cut_off_verdict_must_be_the_choice_itself():
    for text, read in {
        "1": True,
        "**1": True,
        "Passage 1": False,
        "Answer: 1": False,
        '{"verdict": "1"}': True,
        "1, as": False,
    }.items():
        reply = judged(Reply(text, "", "length"), PAIR)
        assert (reply.reason == "") is read, text


def test_grades_are_verdicts_too():
    grades = ("0", "1", "2", "3")
    assert [parse_verdict(text, grades) for text in ("2", "Grade: 2", "**3**", "Answer: 0")] == ["2", "2", "3", "0"]
    assert not any(parse_verdict(text, grades) for text in ("Passage 2", "2/3", "2 out of 3", "2-3", "-1", "4", "2.5", "1 or 2"))


# --- how replies end, and thoughts

ENDS = {
    "stop": "stop STOP eos eos_token end_turn stop_sequence COMPLETE finish FinishReason.STOP FINISH_REASON_STOP eosFound done"
}
ENDS["length"] = "length LENGTH max_tokens MAX_TOKENS model_length FinishReason.MAX_TOKENS maxPredictedTokensReached token_limit"
OWN = "error SAFETY RECITATION insufficient_system_resource content_filter abort tool_calls time_limit ERROR_LIMIT load".split()  # noqa: SIM905


def test_words_of_the_end():
    assert {word: ended(word) for words in ENDS.values() for word in words.split()} == {
        word: end for end, words in ENDS.items() for word in words.split()
    }
    assert [ended(word) for word in OWN] == OWN
    assert ended("") == "stop"
    ours = ["written", "pending", "tie", "not_recorded", "disagreement", "unparsable", "安全", "..", "\n"]
    assert [word for word in ours if ended(word) in ours] == [".."]
    assert all(
        word.isascii() and word.isprintable() and 0 < len(word) < 60 for word in map(ended, ["é" * 99, "a\0/b", "\x1b[1m"])
    )


PLAIN = ["A < b > c.", "Thinking about <b>things</b>.", "<thinker>x</thinker>", "List[think].", "<think-tank> is a word."]


def test_what_is_no_thought_stays():
    assert [without_thoughts(text) for text in PLAIN] == [(text, False) for text in PLAIN]


def test_judging_twice_changes_nothing():
    for text in ("<think>a</think>b", "<think>a", "a</think><answer>b</answer>", "b"):
        for finish in ("stop", "length", "SAFETY", "MAX_TOKENS"):
            for choices in ((), PAIR):
                once = judged(Reply(text, "", finish), choices)
                assert judged(once, choices) == once, (text, finish, choices)
