"""The target `tensorrt`: the dense part as explicitly quantized ONNX, in the form of TensorRT 10 and 11."""
