"""There is no TensorFlow half; SMDDP's own ended with TensorFlow 2.11."""

raise ImportError(
    "smdistributed.dataparallel.tensorflow: TensorFlow is not supported by smdistributed-shim (AWS's library ended its "
    "support with TensorFlow 2.11). NumPy arrays, and what has DLPack, can be reduced by smdistributed_rs.init()"
)
