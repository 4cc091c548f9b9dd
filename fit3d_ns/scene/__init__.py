"""What a capture and a lifted scene are: `PosedCapture`, `FeatureScene`, `FeatureDecoder`, and their files."""

from fit3d_ns.scene.feature_decoder import FeatureDecoder, TokenReadingRule, create_token_reader, read_at_tokens
from fit3d_ns.scene.feature_scene import FeatureScene, create_depth_view
from fit3d_ns.scene.gaussians import ActivatedGaussians, Gaussians
from fit3d_ns.scene.posed_capture import PosedCapture, View, create_posed_capture
from fit3d_ns.scene.scene_file import load_scene, save_scene
