"""hfcustom lint-serving: will a server that runs transformers' own modeling code run a customisation?

target -> Served (target.py) -> RULES (outside.py, inside.py, around.py) -> Finding, ... -> terminal or JSON (command.py).

The rules are those of vLLM's Transformers modeling backend, as its documentation ("Supported models", writing custom models)
and its code (vllm/model_executor/models/transformers) have them: it builds `AutoModel.from_config(config)`, which is the inner
model alone; calls its get_image_features, and its forward with six arguments; has a head of its own; replaces attention through
ALL_ATTENTION_FUNCTIONS; and loads weights by name. SGLang's backend is made alike.
"""
