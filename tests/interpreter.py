"""Triton's interpreter, with less to do.

Its language is patched once a launch, not once more for every call inside it: ``InterpretedFunction.__call__``, which runs a
kernel's helpers, patches some hundred names that the launch has patched already; that took two thirds of the time of all tests
that interpret. What follows from the type of a value alone is worked out once for each type, not for each value. Sums of
integers are not made once more in 64 bits, for an assertion that triton leaves out; equal shapes are not compared size by size.
"""

import dataclasses
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


def work_less() -> bool:
    """Likewise."""
    try:
        from triton.language import core, semantic
        from triton.runtime import interpreter

        options, broadcast = interpreter.interpreter_builder.options, semantic.TritonSemantic.broadcast_impl_value

        probe = core.tensor(None, core.block_type(core.float32, [2, 4]))
        if set(vars(probe)) != {"handle", "type", "dtype", "shape", "numel"} or vars(core.float32).get("name") != "fp32":
            return False
        of_numpy = interpreter._get_np_dtype
        of_numpy(core.float32)
        if options.sanitize_overflow and not options.debug:  # else the assertion is made
            interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    except (ImportError, AttributeError, TypeError):
        return False
    make_block, make_tensor = core.block_type.__init__, core.tensor.__init__
    blocks, tensors, dtypes = {}, {}, {}  # by name: not all types can be hashed

    def numpy_dtype(type):
        if type.name not in dtypes:
            dtypes[type.name] = of_numpy(type)
        return dtypes[type.name]

    def block_init(self, element_ty, shape):
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key], element_ty=element_ty)

    def tensor_init(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[type.name]

    def broadcast_impl_value(self, lhs, rhs):
        same = lhs.type.is_block() and rhs.type.is_block() and list(lhs.type.shape) == list(rhs.type.shape)
        return (lhs, rhs) if same else broadcast(self, lhs, rhs)

    core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype = block_init, tensor_init, numpy_dtype
    semantic.TritonSemantic.broadcast_impl_value = broadcast_impl_value
    return True
