"""The stage synthesize with all it is given side by side."""

from dd.execution import Local
from dd.stages import synthesize as stage


def synthesize(
    folder,
    generator,
    prompts,
    taxonomy,
    num_images,
    seed,
    unit_size,
    image_format="jpg",
    clip=None,
    executor=None,
    build=None,
    chosen_on=(),
    **settings,
):
    makers = stage.Makers(generator, clip, executor or Local(), build)
    given = {"num_images": num_images, "seed": seed, "unit_size": unit_size, **settings}
    asked = stage.SynthesisSettings(image_format=image_format, **given)
    return stage.synthesize(folder, makers, prompts, taxonomy, asked, chosen_on)
