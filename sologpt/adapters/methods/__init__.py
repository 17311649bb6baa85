"""The methods of finetuning, by name. Every module in this folder is a method: the one Method class that it defines."""

import importlib
import pkgutil

from sologpt.adapters.method import Method

METHODS: dict[str, type[Method]] = {}
for info in pkgutil.iter_modules(__path__, f'{__name__}.'):  # every module here is a method
    defined = vars(importlib.import_module(info.name)).values()
    [method] = [c for c in defined if isinstance(c, type) and issubclass(c, Method) and c.__module__ == info.name]
    METHODS[method.name] = method
