"""Serve files of `glit export` with MLServer: `examples/README.md` has the commands."""

import asyncio

import numpy as np
from glit_runtime import OnnxClassifier
from glit_runtime.errors import GlitError
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceRequest, InferenceResponse, MetadataTensor
from mlserver.utils import get_model_uri


class GlitClassifier(MLModel):
    """A classifier whose file is the `uri` in `model-settings.json`."""

    async def load(self) -> bool:
        self.classifier = OnnxClassifier(await get_model_uri(self._settings))
        info = self.classifier.info
        sides = [-1, -1, info.input_size[0]] if info.preprocess else list(info.input_size)
        datatype = {"uint8": "UINT8", "float16": "FP16", "float32": "FP32"}[self.classifier.input_dtype.name]
        self.inputs = [MetadataTensor(name=self.classifier.input_name, datatype=datatype, shape=[-1, *sides])]
        self.outputs = [MetadataTensor(name="logits", datatype="FP32", shape=[-1, info.num_classes])]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = self._images(payload)
        logits = await asyncio.to_thread(self.classifier.logits, images)
        output = NumpyCodec.encode_output("logits", logits)
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=[output])

    def _images(self, payload: InferenceRequest) -> np.ndarray:
        """The images of a request. Raises InferenceError, which the client gets with status 400."""
        wanted = self.inputs[0]
        if [(given.name, given.datatype) for given in payload.inputs] != [(wanted.name, wanted.datatype)]:
            raise InferenceError(f"the only input is {wanted.name!r} of type {wanted.datatype}")
        try:
            images: np.ndarray = NumpyCodec.decode_input(payload.inputs[0])
            self.classifier.check(images, self.name)
        except (ValueError, TypeError, OverflowError, GlitError) as error:
            raise InferenceError(str(error)) from error
        return images
