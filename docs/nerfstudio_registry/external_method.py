"""For nerfstudio's `nerfstudio/configs/external_methods.py`: what `ns-train fit3d-features` says where it is missing.

`fit3d.md` goes to `docs/nerfology/methods/`, and its name, `fit3d`, into the list of methods in its `index.md`.
"""

from nerfstudio.configs.external_methods import ExternalMethod, external_methods

external_methods.append(
    ExternalMethod(
        """[bold yellow]FiT3D features[/bold yellow]
For more information visit: https://docs.nerf.studio/nerfology/methods/fit3d.html

To enable FiT3D features, you must install it first by running:
  [grey]pip install git+REPOSITORY[/grey]""",
        configurations=[
            ("fit3d-features", "Splats with features of a vision transformer, solved in closed form"),
            ("fit3d-features-paper", "Splats with features of a vision transformer, trained as in the paper"),
        ],
        pip_package="git+REPOSITORY",
    )
)
