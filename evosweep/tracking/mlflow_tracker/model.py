"""The exported winner as a model of MLflow's that ``mlflow.pyfunc`` loads: code as text and weights, no pickle."""

import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

QUOTE = "'"
EXAMPLE = (["The capital of France is"], {"max_new_tokens": 32})
SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string")]),
    outputs=Schema([ColSpec("string")]),
    params=ParamSchema([ParamSpec("max_new_tokens", "long", 32)]),
)
CODE = '''\
"""A compressed language model: give it prompts, get their continuations."""

import mlflow
import transformers


class Winner(mlflow.pyfunc.PythonModel):
    """Continues prompts greedily; ``params={{"max_new_tokens": 64}}`` for longer ones."""

    def load_context(self, context):
        """Load the weights."""
        folder = context.artifacts["model"]
{load}
        self.model = model.eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def predict(self, context, model_input: list[str], params=None) -> list[str]:
        """Return a continuation for each prompt."""
        tokens = (params or {{}}).get("max_new_tokens", 32)
        texts = []
        for prompt in model_input:
            given = self.tokenizer(prompt, return_tensors="pt")
            made = self.model.generate(**given, max_new_tokens=tokens, do_sample=False)
            texts.append(self.tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
        return texts


mlflow.models.set_model(Winner())
'''


def log_winner(
    client: MlflowClient,
    *,
    run: str,
    name: str,
    folder: Path,
    load: str,
    params: Mapping[str, str],
    register: str | None = None,
) -> None:
    """Log the exported winner as the model of a run.

    Args:
        client: Of the store.
        run: The run that found it.
        name: Of the model.
        folder: The exported weights.
        load: Code that loads them.
        params: Shown with the model.
        register: Name under which it becomes a version of a registered model; None: it is not registered.
    """
    load = "\n".join(f"        {line}" if line else "" for line in load.splitlines())
    experiment = client.get_run(run).info.experiment_id
    made = client.create_logged_model(
        experiment,
        name=_allowed(name),
        source_run_id=run,
        model_type="evosweep",
        params=dict(params),
    )
    with tempfile.TemporaryDirectory() as temporary:
        code = Path(temporary) / "winner.py"
        saved = Path(temporary) / "saved"
        code.write_text(CODE.format(load=load), encoding="utf-8")
        mlflow.pyfunc.save_model(
            str(saved),
            python_model=str(code),
            artifacts={"model": str(folder)},
            input_example=EXAMPLE,
            signature=SIGNATURE,
            pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "torch", "transformers")],
        )
        client.log_model_artifacts(made.model_id, str(saved))
    client.finalize_logged_model(made.model_id, "READY")
    client.log_outputs(run, [LoggedModelOutput(made.model_id, step=0)])
    if register is not None:
        _register(client, register, run=run, model_id=made.model_id, params=params)


def _register(client: MlflowClient, name: str, *, run: str, model_id: str, params: Mapping[str, str]) -> None:
    """Register a logged model in MLflow's registry as a new version of a name, which is created if it is new.

    Args:
        client: Of the store.
        name: Of the registered model.
        run: The run that found it.
        model_id: Of the logged model.
        params: Become the version's tags.
    """
    if not client.search_registered_models(f"name = '{name.replace(QUOTE, QUOTE * 2)}'"):
        client.create_registered_model(name)
    client.create_model_version(
        name, source=f"models:/{model_id}", run_id=run, model_id=model_id, tags={k: str(v) for k, v in params.items()}
    )


def _allowed(name: str) -> str:
    """Return a name without the characters that MLflow forbids in names of models."""
    return "".join("-" if letter in "/:.%\"'=" else letter for letter in name)
