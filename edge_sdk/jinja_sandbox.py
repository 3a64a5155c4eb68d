"""Chat templates written by others, run so that they can do nothing but write a little text.

Knows Jinja. Does not know messages or models.
"""

from collections.abc import Callable
from typing import Any

from edge_sdk.errors import RuntimeFailure

Render = Callable[..., str]


def compile_template(source: str) -> Render:
    """Return a function of the template's variables that writes its text.

    Raises:
        RuntimeFailure: Jinja is missing, or the template is malformed or not allowed; so does the
            function when the template fails.
    """
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as exc:
        raise RuntimeFailure(
            f"this bundle's chat template needs the infer extra: pip install 'symbiont[infer]' "
            f"({exc})"
        ) from exc
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: object) -> None:
        raise RuntimeFailure(f"the chat template refuses these messages: {message}")

    environment.globals["raise_exception"] = refuse
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as exc:
        raise RuntimeFailure(f"the bundle's chat template is malformed: {exc}") from exc

    def render(**variables: Any) -> str:
        try:
            return template.render(**variables)
        except jinja2.TemplateError as exc:
            raise RuntimeFailure(f"the bundle's chat template failed: {exc}") from exc

    return render
