"""Triton's interpreter, with less to do: its language is patched once a launch, not once more for every call inside it.

``InterpretedFunction.__call__``, which runs a kernel's helpers, patches some hundred names that the launch has patched already;
that took two thirds of the time of all tests that interpret.
"""

import inspect


class _Nothing:
    """Of a patch that changed nothing."""

    def restore(self):
        pass


def patch_once_a_launch() -> bool:
    """Whether it could be done: the names are triton's own, and other versions may have none of them."""
    try:
        from triton import language
        from triton.runtime import interpreter

        patch, is_builtin = interpreter._patch_lang, language.core.is_builtin
    except (ImportError, AttributeError):
        return False
    if list(inspect.signature(patch).parameters) != ["fn"] or not is_builtin(language.load):
        return False
    visible = {}  # by the globals of a function, which live as long as its module

    def patch_lang(fn):
        place = id(fn.__globals__)
        if place not in visible:
            visible[place] = [m for m in (language, language.core) if any(m is value for value in fn.__globals__.values())]
        patched = visible[place] and not any(is_builtin(module.load) for module in visible[place])
        return _Nothing() if patched else patch(fn)

    interpreter._patch_lang = patch_lang
    return True
