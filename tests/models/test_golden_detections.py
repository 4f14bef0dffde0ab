"""Decoding and NMS against the real OpenPCDet code."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from golden import NUM_HEADS, SMALL, raw_heads

from cpq_train.common.nuscenes import CLASS_GROUPS, DETECTION_CLASSES
from cpq_train.models import PostProcessing, decode, rotated_iou_bev, rotated_nms

POST = PostProcessing()


@pytest.mark.parametrize("head", range(NUM_HEADS))
def test_decoded_boxes_before_nms(eval_arrays: Any, head: int) -> None:
    raw = raw_heads(eval_arrays, "head{}_{}")[head]
    without_nms = replace(POST, nms_iou=1.0, nms_post=1000)
    found = decode([raw], replace(SMALL, class_groups=(CLASS_GROUPS[head],)), without_nms)
    first = DETECTION_CLASSES.index(CLASS_GROUPS[head][0])
    for sample, detections in enumerate(found):
        prefix = f"prenms_h{head}_b{sample}"
        expected = eval_arrays[f"{prefix}_boxes"]
        np.testing.assert_allclose(detections.scores, eval_arrays[f"{prefix}_scores"], rtol=1e-5)
        np.testing.assert_array_equal(detections.labels - first, eval_arrays[f"{prefix}_cls_in_head"])
        np.testing.assert_allclose(detections.boxes, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("head", range(NUM_HEADS))
@pytest.mark.parametrize("sample", [0, 1])
def test_kept_sets(eval_arrays: Any, head: int, sample: int) -> None:
    boxes = torch.from_numpy(eval_arrays[f"prenms_h{head}_b{sample}_boxes"])
    scores = torch.from_numpy(eval_arrays[f"prenms_h{head}_b{sample}_scores"])
    kept = rotated_nms(boxes, scores, POST.nms_iou, max_pre=POST.nms_pre, max_post=POST.nms_post)
    np.testing.assert_array_equal(kept, eval_arrays[f"nms_exact_h{head}_b{sample}"])
    np.testing.assert_array_equal(kept, eval_arrays[f"nms_pcdmargin_h{head}_b{sample}"])


def test_final_detections(eval_arrays: Any) -> None:
    found = decode(raw_heads(eval_arrays, "head{}_{}"), SMALL, POST)
    for sample, detections in enumerate(found):
        np.testing.assert_array_equal(detections.labels + 1, eval_arrays[f"final_b{sample}_labels_1based"])
        np.testing.assert_allclose(detections.scores, eval_arrays[f"final_b{sample}_scores"], rtol=1e-5)
        boxes = eval_arrays[f"final_b{sample}_boxes"]
        np.testing.assert_allclose(detections.boxes, boxes, rtol=1e-5, atol=1e-4)


def test_iou_is_exact(nms_arrays: Any) -> None:
    boxes = torch.from_numpy(nms_arrays["iou_boxes"])
    iou = rotated_iou_bev(boxes, boxes)
    np.testing.assert_allclose(iou, nms_arrays["iou_exact_f64"], atol=1e-9)
    np.testing.assert_allclose(iou, nms_arrays["iou_openpcdet_f32"], atol=0.01)  # their margin of 1 cm


def test_kept_set_of_many_boxes(nms_arrays: Any) -> None:
    boxes = torch.from_numpy(nms_arrays["nms_boxes"])
    scores = torch.from_numpy(nms_arrays["nms_scores"])
    kept = rotated_nms(boxes, scores, float(nms_arrays["nms_thresh"]))
    np.testing.assert_array_equal(kept, nms_arrays["nms_keep"])
