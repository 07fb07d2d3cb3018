import subprocess
import sys


def test_a_process_that_has_videos_read_loads_no_decoder_and_no_torch() -> None:
    program = (
        "import sys, dycoke_core.video;"
        "loaded = {'av', 'decord', 'torch', 'PIL'} & set(sys.modules);"
        "sys.exit(str(loaded) if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_no_process_loads_both_decoders() -> None:
    """Each wheel carries an FFmpeg; together, calls of one land in the other."""
    for module, other in (("decord_reader", "av"), ("pyav_reader", "decord")):
        program = f"import sys, dycoke_core.video.{module}; sys.exit({other!r} in sys.modules)"
        subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
