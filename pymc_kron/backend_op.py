"""Operations that stand in a program for one backend, which has to be told of them.

A compiled function that is sent to another process, as PyMC does with ``mp_ctx="spawn"``, arrives
rewritten: no rewrite runs there, and so none that could tell.
"""

from importlib import import_module

from pytensor.graph.op import Op


class BackendOp(Op):
    """An operation that a backend converts as it is told in another module.

    The module is imported by the rewrite that makes the operation, and where one is unpickled.
    """

    conversion: str

    def __reduce__(self) -> tuple:
        properties = {name: getattr(self, name) for name in self.__props__}
        return _unpickle, (type(self), properties)


def _unpickle(op_type: type[BackendOp], properties: dict) -> BackendOp:
    import_module(op_type.conversion)
    return op_type(**properties)
