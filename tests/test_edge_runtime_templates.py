"""Chat templates: the usual ones write what Jinja writes; hostile ones end in an error, soon."""

import resource
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_sdk.chat_template import ChatTemplate
from edge_sdk.errors import RuntimeFailure
from edge_sdk.jinja_sandbox import compile_template

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " hello "},
    {"role": "assistant", "content": "Hello <you>"},
    {"role": "user", "content": "and you?"},
]
VARIABLES = {"messages": MESSAGES, "add_generation_prompt": True, "bos_token": "<s>"}
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USUAL = {
    "marked turns": MARKED,
    "system split off": """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
[{{ system }}]
{%- for message in messages %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if loop.last and tools is defined %} tools{% endif %}
    {{- '<' ~ message.role ~ '>' ~ message['content'].strip() ~ '</>' }}
{%- endfor %}""",
    "the rest of the language": """{%- set ns = namespace(count=0, last=none, found=false) %}
{%- for message in messages[::-1] if message.role == 'user' %}
    {%- set ns.count = ns.count + 1 %}
    {%- if not ns.found %}{%- set ns.found = true %}{%- set ns.last = message %}{% endif %}
{%- endfor %}
{%- macro turn(role, text='') -%}<{{ role | upper }}>{{ text }}{%- endmacro %}
{{- ns.count ~ ns.last.content }}{{ turn('a', 'b') }}
{{- messages | map(attribute='role') | unique | join(', ') }}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}
{%- for key, value in messages[2].items() %}{{ key }}={{ value.split('l')[-1] }};{% endfor %}
{%- for number in range(5) %}{% if number == 3 %}{% break %}{% endif %}{{ number }}{% endfor %}
{{- [1, 2] + [3] }}{{ {'a': (1, 'x')} }}{{ 'a' if missing is not defined else 'b' }}
{{- 'x,y'.replace(',', '--') }}{{ 7 // 2 * 3 - 1 }}{{ messages is string }}{{ none is none }}
{%- filter upper %}filtered{% endfilter %}{% set block %}caught{% endset %}{{ block }}""",
}


@pytest.mark.parametrize("name", USUAL)
def test_a_usual_template_writes_what_jinja_writes(name: str) -> None:
    plain = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    expected = plain.from_string(USUAL[name]).render(**VARIABLES)

    assert compile_template(USUAL[name])(**VARIABLES) == expected
    assert len(expected) > 60


def test_names_that_chat_templates_expect_are_there() -> None:
    now = lambda: datetime(2026, 11, 21, 9, 5)  # noqa: E731
    source = (
        "{{ strftime_now('%d %b %Y') }}{% generation %}{{ messages[1] | tojson }}"
        "{% endgeneration %}"
    )

    written = compile_template(source, now=now)(**VARIABLES)

    assert written == '21 Nov 2026{"content": " hello ", "role": "user"}'
    with pytest.raises(RuntimeFailure, match="refuses these messages: no system please"):
        compile_template("{{ raise_exception('no system please') }}")(**VARIABLES)


def test_a_long_conversation_is_no_attack() -> None:
    """Two hundred long turns, each looked at together with all that came before it."""
    messages = [{"role": "user", "content": "word " * 200}] * 200
    source = (
        "{% for m in messages %}{{ (messages[: loop.index] | length) ~ m.content }}{% endfor %}"
    )

    assert len(compile_template(source)(messages=messages)) > 200_000


def nested(loop: str, deep: int) -> str:
    opened = "".join(f"{{% for v{i} in {loop} %}}" for i in range(deep))
    return opened + "{% endfor %}" * deep


def again(start: str, step: str, times: int = 40) -> str:
    return start + step * times + "{{ s }}"


HOSTILE = {
    "loops": nested("range(9999)", 3),
    "loops over text": nested(f"'{'x' * 40}'", 9),
    "loops over literals": nested("[1, 2, 3, 4, 5, 6]", 12),
    "a product of text": "{{ 'a' * 10000000000 }}",
    "a product of lists": "{{ ['a'] * 99999 * 99999 }}",
    "powers": "{{ 10 ** 10 ** 10 }}",
    "squares": again("{% set s = 9999999 %}", "{% set s = s * s %}"),
    "doubling": again("{% set s = 'aaaa' %}", "{% set s = s ~ s %}"),
    "doubling by plus": again("{% set s = 'aaaa' %}", "{% set s = s + s %}"),
    "doubling by output": again("{% set s = 'aaaa' %}", "{% set s %}{{ s }}{{ s }}{% endset %}"),
    "doubling lists": again("{% set s = ['a'] %}", "{% set s = [s, s] %}"),
    "doubling dicts": again("{% set s = {} %}", "{% set s = {'a': s, 'b': s} %}"),
    "equal lists": again("{% set s = [1] %}{% set t = [1] %}", "{% set s=[s,s] %}{% set t=[t,t] %}")
    + "{{ s == t }}",
    "replacing": again("{% set s = 'a' %}", "{% set s = s | replace('a', 'aaaaaaaa') %}"),
    "replacing nothing": again("{% set s = 'a' %}", "{% set s = s.replace('', 'aaaaaaaa') %}"),
    "joining": again("{% set s = 'aaaaaaaaaaaa' %}", "{% set s = s | join(s) %}"),
    "joining by method": again("{% set s = 'aaaaaaaaaaaa' %}", "{% set s = s.join(s) %}"),
    "macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(60) }}",
    "recursion": "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "recursive loops": "{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "widths": "{{ 'a' | center(1000000000) }}",
    "widths by method": "{{ 'a'.ljust(1000000000) }}",
    "widths by format": "{{ '%1000000000d' % 1 }}",
    "widths by str.format": "{{ '{:1000000000}'.format(1) }}",
    "widths in dates": "{{ strftime_now('%1000000000d') }}",
    "widths by map": "{{ ['a'] | map('center', 1000000000) | list }}",
    "batches": "{{ 'a' | batch(1000000000, 'x') | list }}",
    "ranges": "{{ range(10000000000) | list }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['__builtins__'] }}",
    "filters of classes": "{{ (messages | attr('__class__')).mro() }}",
    "other files": "{% include '/etc/passwd' %}",
    "other modules": "{% import 'os' as os %}",
    "other methods": "{{ messages[0].content.encode('utf-16') }}",
    "text on demand": "{{ lipsum(n=100000000) }}",
    "deep": "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    "long": "a" * 200_000,
    "not Jinja": "{% for %}",
}
CHILD = """
import resource, sys
from edge_sdk.errors import RuntimeFailure
from tests.test_edge_runtime_templates import HOSTILE, VARIABLES
from edge_sdk.jinja_sandbox import compile_template
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
before = resource.getrusage(resource.RUSAGE_SELF)
for name, source in HOSTILE.items():
    began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    try:
        text = compile_template(source)(**VARIABLES)
        print("wrote", name, len(text))
    except RuntimeFailure as exc:
        if "template" not in str(exc) or len(str(exc)) > 700 + len(name):
            print("unclear", name, exc)
    seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime - began
    if seconds > 5:
        print("slow", name, seconds)
after = resource.getrusage(resource.RUSAGE_SELF)
print("done", (after.ru_maxrss - before.ru_maxrss) // 1024 < 64)
"""


def test_a_hostile_template_ends_in_an_error_within_its_budget() -> None:
    """All of them in one process with room for a gigabyte: none comes near it, or over seconds."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout == "done True\n", done.stdout + done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2**20


def test_without_jinja_only_a_template_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "edge_sdk.jinja_sandbox")
    assert ChatTemplate(tmp_path).render(MESSAGES[1:2]) == "User: hello\nAssistant:"
    (tmp_path / "chat_template.jinja").write_text(MARKED)

    with pytest.raises(RuntimeFailure, match=r"needs the infer extra: pip install 'symbiont\[inf"):
        ChatTemplate(tmp_path).render(MESSAGES)


def test_the_template_is_found_where_bundles_keep_it(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    assert ChatTemplate(tmp_path).stops == ("\nUser:",)
    config.write_text('{"bos_token": {"content": "<s>"}, "chat_template": "{{ bos_token }}one"}')
    assert ChatTemplate(tmp_path).render(MESSAGES) == "<s>one"
    assert ChatTemplate(tmp_path).begin == "<s>"
    config.write_text('{"chat_template": [{"name": "default", "template": "several"}]}')
    assert ChatTemplate(tmp_path).render(MESSAGES) == "several"
    (tmp_path / "chat_template.jinja").write_text(MARKED)
    assert (
        ChatTemplate(tmp_path)
        .render(MESSAGES)
        .endswith("and you?<|im_end|>\n<|im_start|>assistant\n")
    )
    assert ChatTemplate(tmp_path).stops == ()
    config.write_text("{")
    with pytest.raises(RuntimeFailure, match=r"tokenizer_config\.json cannot be read"):
        ChatTemplate(tmp_path)
