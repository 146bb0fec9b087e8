"""Encoded bytes <-> uint8 frames (f h w c). The only package that knows the codec libraries: PyAV (FFmpeg), and Pillow for
animations.

- reading.py: a clip out of a file; timing.py: which frames; decoding.py: the fast way to them; torchcodec_backend.py: another library's
- writing.py: mp4; animation.py: gif and webp; contact_sheet.py: videos side by side over their captions
"""

from t2v.video.animation import gif_bytes as gif_bytes
from t2v.video.animation import webp_bytes as webp_bytes
from t2v.video.animation import write_animation as write_animation
from t2v.video.bad_sample import BadSample as BadSample
from t2v.video.contact_sheet import contact_sheet as contact_sheet
from t2v.video.contact_sheet import film_strips as film_strips
from t2v.video.reading import VideoInfo as VideoInfo
from t2v.video.reading import decode_clip as decode_clip
from t2v.video.reading import probe as probe
from t2v.video.writing import write_mp4 as write_mp4
