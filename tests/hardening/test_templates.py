"""Chat templates as programs of strangers: whatever one does ends soon, in a text or in one sentence.

The fuzz puts programs together from pieces that cost, and counts them; it prints its seed.
"""

import json
import random
import threading
import time

import pytest

pytest.importorskip("jinja2")

from tests.support import limits
from tests.support.counting import Counter
from tests.text.test_chat import CONVERSATIONS, TEMPLATES
from trimserve.errors import TrimserveError, UsageError
from trimserve.text import budget
from trimserve.text.chat import ChatTemplate, render_chat

SEED = 20261130
PROGRAMS = 2000
SLOW_PROGRAMS = 3_000
# Of processor time, here: less than users have, for the sake of the suite; and what only a template that
# nothing stops takes.
SECONDS = 0.1
MOST_SECONDS = SECONDS + limits.SECONDS
MESSAGES = [{"role": "user", "content": "x"}]
DOUBLED = "{% set ns = namespace(x=START, y=START) %}{% for i in range(99) %}STEP{% endfor %}"


pytestmark = pytest.mark.filterwarnings("ignore::SyntaxWarning")


@pytest.fixture(autouse=True)
def little_time(request, monkeypatch):
    if request.node.get_closest_marker("realdata") is None:
        monkeypatch.setattr(budget, "SECONDS", SECONDS)


def render(source, messages=MESSAGES, **variables):
    """What a template gives, or the sentence of its fault; and its seconds of processor time."""
    start = time.thread_time()
    try:
        found = ChatTemplate(source, {}, "model/chat_template.jinja").render(messages, **variables)
    except TrimserveError as error:
        found = error
    seconds = time.thread_time() - start
    if isinstance(found, TrimserveError):
        assert "\n" not in str(found)
        assert "model/chat_template.jinja" in str(found)
    return found, seconds


def doubled(start, step, end="{{ ns.x }}"):
    return DOUBLED.replace("START", start).replace("STEP", step) + end


# Programs that would take hours, or more memory than there is, each by another construct.
ENDLESS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "condition": "{% set b = range(99999)|list %}{% for i in b if [i] in b %}{% endfor %}",
    "select": "{% set b = range(99999)|list %}{{ b|map('string')|select('in', b)|list }}",
    "in": "{% set b = range(99999)|list %}{% for i in b %}{% if 'x' in b %}{% endif %}{% endfor %}",
    "sort": "{% set b = range(99999)|list %}{% for i in b %}{% set c = b|sort %}{% endfor %}",
    "macro": "{% macro f(n) %}{{ f(n-1) if n }}{{ f(n-1) if n }}{% endmacro %}{{ f(90) }}",
    "slices": "{% set x = 'a' * 16000000 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "compared": "{% set x = 'a' * 16000000 %}{% set y = 'a' * 16000000 %}"
    + "{% if x == y %}{% endif %}" * 4000,
    "changed": "{% for i in range(99999) %}{{ loop.changed(range(9999)|list) }}{% endfor %}",
}
HUGE = {
    "center": "{{ 'x'|center(10**14) }}",
    "constant": "{{ 'x'|center(100000000000000) }}",
    "method": "{{ 'x'.center(10**10) }}",
    "captured": "{% set f = 'x'.center %}{{ f(10**10) }}",
    "attr": "{{ ('x'|attr('center'))(10**10) }}",
    "times": "{{ 'x' * 10**12 }}",
    "power": "{{ 2 ** (10 ** 9) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "star": "{{ '%*d' % (10**10, 1) }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "nested": "{{ '{:{w}}'.format(1, w='9999999999') }}",
    "filter": "{{ '%10000000000d'|format(1) }}",
    "joined": doubled("'x'", "{% set ns.x = ns.x ~ ns.x %}"),
    "added": doubled("'x'", "{% set ns.x = ns.x + ns.x %}"),
    "replaced": doubled("'x'", "{% set ns.x = ns.x|replace('x', 'xx') %}"),
    "buffer": doubled("'x'", "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "printed": doubled("[1]", "{% set ns.x = [ns.x, ns.x] %}"),
    "json": doubled("[1]", "{% set ns.x = [ns.x, ns.x] %}", "{{ ns.x|tojson }}"),
    "equal": doubled("[1]", "{% set ns.x = [ns.x] * 2 %}{% set ns.y = [ns.y] * 2 %}", "{{ ns.x == ns.y }}"),
    "hashed": doubled("(1,)", "{% set ns.x = (ns.x, ns.x) %}", "{{ {ns.x: 1} }}"),
    "looked up": doubled("(1,)", "{% set ns.x = (ns.x, ns.x) %}", "{{ {}[ns.x] }}"),
    "got": doubled("(1,)", "{% set ns.x = (ns.x, ns.x) %}", "{{ {}.get(ns.x) }}"),
    "spaces": doubled("1", "{% set ns.x = namespace(a=ns.x, b=ns.x) %}"),
    "itself": "{% set ns = namespace() %}{% set ns.ns = ns %}{{ ns }}",
    "bytes": "{{ (5).to_bytes(10**10, 'big') }}",
    "round": "{{ 5|round(-1000000000) }}",
    "batch": "{{ [1]|batch(10**10, 0)|list }}",
    "slice": "{{ [1]|slice(10**10)|list }}",
    "indent": "{{ messages|tojson(indent=10**10) }}",
    "lines": "{{ ('a\n' * 9999)|indent(9999) }}",
    "tabs": "{{ ('\t' * 9999999).expandtabs(9999) }}",
    "translate": "{{ ('a'*4000).translate({97: 'b' * 16000000}) }}",
    "generator": "{{ range(99999)|map('center', 9999)|join }}",
    "literals": "{% set x %}{% for i in range(99999) %}" + "y" * 100_000 + "{% endfor %}{% endset %}",
    "strip": "{% set x = 'a' * 9000000 %}{{ x.strip('b' * 9000000) }}",
    "rfind": "{% set x = 'a' * 9000000 %}{{ x.rfind('b' + 'a' * 4500000) }}",
    "sum": "{{ ([[1,2]] * 99999)|sum(start=[])|length }}",
    "output": "{{ 'x' * 9000000 }}{{ 'x' * 9000000 }}",
    "long": "{{ '" + "a" * 200_000 + "' }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_template_is_stopped_in_any_thread(name):
    found = []
    thread = threading.Thread(target=lambda: found.append(render(ENDLESS[name])))
    thread.start()
    thread.join(60)
    ((error, seconds),) = found
    assert isinstance(error, UsageError)
    assert "processor time" in str(error) or "sandbox blocks ranges" in str(error)
    assert seconds < MOST_SECONDS


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_text_is_refused_before_it_is_made(name):
    error, seconds = render(HUGE[name])
    assert isinstance(error, UsageError)
    assert "(" in str(error)
    assert seconds < MOST_SECONDS


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ 1/0 }}", "line 1: division by zero"),
        ("\n\n{{ messages + 1 }}", "line 3: can only concatenate list"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself"),
        ("{{ nope|tojson }}", "Undefined is not JSON serializable"),
        ("{{ nope.x }}", "'nope' is undefined"),
        ("{{ 'a' + messages[0].content + none }}", "can only concatenate str"),
        ("{% if %}", "Expected an expression"),
        ("{{ x|nofilter }}", "No filter named 'nofilter'"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "nested blocks"),
    ],
)
def test_what_a_template_raises_is_its_fault_in_one_sentence(source, reason):
    error, _ = render(source)
    assert isinstance(error, UsageError)
    assert str(error).startswith("the chat template in model/chat_template.jinja fails on these messages (")
    assert reason in str(error)


def test_what_a_template_says_itself_is_said():
    error, _ = render("{{ raise_exception('Only user and assistant roles are supported!') }}")
    assert "refuses these messages: Only user and assistant roles are supported!" in str(error)


@pytest.mark.parametrize(
    ("messages", "about"),
    [
        ("hello", "messages should be a list"),
        ({"role": "user"}, "messages should be a list"),
        (None, "found none"),
        (["hello"], "message 1 should be"),
        ([MESSAGES[0], {"content": "x"}], "message 2 should have a role"),
        ([{"role": 5, "content": "x"}], "message 1 should have a role"),
    ],
)
def test_what_is_no_conversation_is_refused_before_the_template(messages, about):
    with pytest.raises(UsageError, match=about):
        render_chat(None, messages)


def test_a_content_that_the_template_cannot_take_is_a_sentence():
    source = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    deep = []
    for _ in range(5000):
        deep = [deep]
    for content in (None, 5, ["x"], [{"type": "text", "text": "x"}], {"a": 1}, deep):
        error, _ = render(source, [{"role": "user", "content": content}])
        assert isinstance(error, UsageError)
    error, _ = render("{{ messages|tojson }}", [{"role": "user", "content": deep}])
    assert isinstance(error, UsageError)


def test_a_long_history_is_rendered(monkeypatch):
    messages = [{"role": "user" if n % 2 == 0 else "assistant", "content": "word " * 20} for n in range(5000)]
    monkeypatch.setattr(budget, "SECONDS", 1.0)
    for source in TEMPLATES.values():
        text, _ = render(source, messages, bos_token="<s>", eos_token="</s>")
        assert text.count("word ") >= 20 * 5000 - 5000


def test_a_budget_is_that_of_one_rendering():
    """What one rendering spends, and one that another thread does meanwhile, is not another's."""
    source = "{% for i in range(5000) %}x{% endfor %}"
    expected, seconds = render(source)
    assert len(expected) == 5000
    found = []
    threads = [threading.Thread(target=lambda: found.append(render(source)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(int(SECONDS / max(seconds, 0.01)) + 2):
        assert render(source)[0] == expected
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


def test_the_budget_costs_an_ordinary_chat_less_than_a_millisecond():
    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    messages = CONVERSATIONS[1]

    def least(call):
        times = []
        for _ in range(50):
            start = time.thread_time()
            call()
            times.append(time.thread_time() - start)
        return min(times)

    plain = environment.from_string(TEMPLATES["llama3"])
    alone = least(lambda: plain.render(messages=messages, add_generation_prompt=True, **variables))
    counted = least(lambda: ChatTemplate(TEMPLATES["llama3"], variables).render(messages))
    assert counted - alone < 1e-3


# Pieces of programs: values, and what is done with them; most are wrong together, many cost much.

_VALUES = [
    *(
        "messages",
        "'x'",
        "''",
        "0",
        "5",
        "-1",
        "10**9",
        "1.5",
        "none",
        "true",
        "[]",
        "[1]",
        "('a', 'b')",
        "{}",
    ),
    *("{'a': 1}", "nope", "range(9)", "range(99999)", "messages[0]", "messages[0].content", "'x' * 99999"),
    *("('x ' * 9999)", "(range(99999)|list)", "ns", "ns.x", "loop", "f", "self", "joiner(',')", "'\\ud800'"),
    *("[[1]] * 999", "'%s'", "'{}'", "'{:99}'", "namespace(a=1)", "dict(a=1)", "'é'.encode()", "2**4000"),
]
_FILTERS = [
    *(
        "abs",
        "attr('x')",
        "batch(2)",
        "capitalize",
        "center(999)",
        "count",
        "default(1)",
        "dictsort",
        "escape",
    ),
    *(
        "filesizeformat",
        "first",
        "float",
        "forceescape",
        "format(1)",
        "groupby('x')",
        "indent(9)",
        "int",
        "items",
    ),
    *(
        "join",
        "join(',')",
        "last",
        "length",
        "list",
        "lower",
        "map('string')",
        "max",
        "min",
        "pprint",
        "random",
    ),
    *(
        "reject",
        "replace('x', 'yyyy')",
        "reverse",
        "round(3)",
        "safe",
        "select",
        "slice(3)",
        "sort",
        "string",
    ),
    *("striptags", "sum", "title", "tojson", "tojson(indent=2)", "trim", "truncate(9)", "unique", "upper"),
    *("urlencode", "urlize", "wordcount", "wordwrap(3)", "xmlattr", "select('in', 'x')", "map('center', 99)"),
]
_METHODS = [
    *("split('x')", "split()", "strip()", "replace('', 'xy')", "format(1)", "join(messages)", "center(999)"),
    *("items()", "keys()", "get('a')", "zfill(99)", "encode()", "expandtabs(9)", "count('x')", "title()"),
    *("hex()", "to_bytes(9, 'big')", "index(1)", "copy()", "partition('x')", "splitlines()", "append(1)"),
]
_OPERATORS = ["+", "-", "*", "**", "/", "//", "%", "~", "==", "<", "in", "not in", "and", "or"]


def expression(rng, depth=3):
    if depth == 0 or rng.random() < 0.2:
        return rng.choice(_VALUES)
    inner = expression(rng, depth - 1)
    kind = rng.randrange(6)
    if kind == 0:
        return f"({inner})|{rng.choice(_FILTERS)}"
    if kind == 1:
        return f"({inner}).{rng.choice(_METHODS)}"
    if kind == 2:
        return f"({inner}) {rng.choice(_OPERATORS)} ({expression(rng, depth - 1)})"
    if kind == 3:
        return f"({inner})[{expression(rng, 0)}]"
    if kind == 4:
        return f"({inner})[{rng.choice(('1:', ':-1', '::2', ''))}:]"
    return f"[{inner}, {inner}]"


def program(rng, depth=2):
    parts = []
    for _ in range(rng.randint(1, 3)):
        kind = rng.randrange(7 if depth else 2)
        inner = program(rng, depth - 1) if depth and kind > 1 else ""
        value = expression(rng)
        parts.append(
            [
                "{{ " + value + " }}",
                "{% set ns.x = " + value + " %}",
                "{% for i in " + value + " %}" + inner + "{% endfor %}",
                "{% for i in range(99) if " + value + " %}" + inner + "{% endfor %}",
                "{% if " + value + " %}" + inner + "{% else %}x{% endif %}",
                "{% set ns.x %}" + inner + "{% endset %}",
                "{% macro f(n=1) %}" + inner + "{% endmacro %}{{ f() }}",
            ][kind]
        )
    return "".join(parts)


def fuzz(count, seed):
    rng = random.Random(seed)
    counter = Counter("chat templates", seed)
    for number in range(count):
        source = "{% set ns = namespace(x='x') %}" + program(rng)
        try:
            found, seconds = render(source)
        except Exception as error:
            error.add_note(f"program {number} of seed {seed}: {source}")
            raise
        assert seconds < MOST_SECONDS, (number, seed, source)
        counter.add("texts" if isinstance(found, str) else "refused")
    counter.check()
    return counter.kinds["texts"]


def test_any_program_ends_in_a_text_or_a_sentence():
    made = fuzz(PROGRAMS, SEED)
    assert PROGRAMS / 20 < made < PROGRAMS


@pytest.mark.fuzz
def test_many_programs_end_in_a_text_or_a_sentence():
    fuzz(SLOW_PROGRAMS, SEED + 1)


@pytest.mark.realdata
@pytest.mark.export
def test_templates_of_real_models_give_what_transformers_gives(data_dir):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    sources = [
        json.loads(path.read_text()).get("chat_template") for path in data_dir.rglob("tokenizer_config.json")
    ]
    tools = [{"type": "function", "function": {"name": "wetter", "parameters": {"type": "object"}}}]
    equal = 0
    for source in filter(None, sources):
        for messages in CONVERSATIONS:
            for given in (None, tools):
                variables = {"bos_token": "<s>", "eos_token": "</s>", "tools": given}
                found, _ = render(source, messages, **variables)
                try:
                    (expected,), _ = utils.render_jinja_template(
                        [messages], chat_template=source, add_generation_prompt=True, **variables
                    )
                except Exception:
                    assert isinstance(found, UsageError)
                    continue
                assert found == expected
                equal += 1
    assert equal >= 4
