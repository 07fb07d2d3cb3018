"""DyCoke as models of lmms-eval: `lmms_eval --model dycoke --model_args pretrained=...`.

`dycoke` takes any model that the service takes; `dycoke_llava_onevision` is the same under the
arguments of DyCoke's released code. lmms-eval finds the manifests through the entry-point group
`lmms_eval.models` and imports a model when it is asked for. Nothing else here imports lmms-eval,
and it is none of our dependencies.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "dycoke"
LLAVA_ONEVISION_ID = "dycoke_llava_onevision"


def manifest() -> "ModelManifest":
    """What lmms-eval's registry wants to know."""
    return _manifest(MODEL_ID, "Dycoke")


def llava_onevision_manifest() -> "ModelManifest":
    return _manifest(LLAVA_ONEVISION_ID, "DycokeLlavaOnevision")


def _manifest(model_id: str, class_name: str) -> "ModelManifest":
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=model_id, simple_class_path=f"dycoke_core.lmms_plugin.model.{class_name}"
    )
