//! The framework image: local first, else pulled, else the prebaked one.

use crate::config::Config;
use crate::container::image::{FrameworkImage, prebaked_image, wanted_image};
use crate::docker::client::{Client, EngineError, Image};
use crate::logging::error_chain;
use crate::report::Reporter;
use crate::values::ImageRef;

/// Why there is no image to create the container from.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// A query failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The image cannot be pulled and has no prebaked replacement.
    #[error("cannot pull the image {image}")]
    Pull {
        /// The wanted image.
        image: ImageRef,
        /// Why the pull failed.
        source: PullError,
    },
    /// The image cannot be pulled and Docker does not have its prebaked replacement.
    #[error("cannot pull the image {image}, and the prebaked image {prebaked} does not exist")]
    NoPrebaked {
        /// The wanted image.
        image: ImageRef,
        /// The prebaked replacement.
        prebaked: ImageRef,
        /// Why the pull failed.
        source: PullError,
    },
}

/// Why a pull failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PullError {
    /// Docker reported an error.
    #[error(transparent)]
    Engine(EngineError),
    /// Docker reported success, but does not list the image.
    #[error("the pull succeeded, but Docker does not list the image")]
    NotListed,
}

/// Finds or pulls the framework image.
///
/// # Errors
/// If neither the wanted nor the prebaked image is available.
pub(super) async fn resolve_image(
    config: &Config,
    engine: &Client,
    container: &str,
    reporter: &Reporter,
) -> Result<FrameworkImage, ImageError> {
    let wanted = wanted_image(config);
    if let Some(image) = find_local(engine, &wanted, container).await? {
        return Ok(framework_image(wanted, &image));
    }
    let source = match pull(engine, &wanted, reporter).await {
        Ok(()) => match engine.find_image(wanted.as_str()).await? {
            Some(image) => return Ok(framework_image(wanted, &image)),
            None => PullError::NotListed,
        },
        Err(error) => PullError::Engine(error),
    };
    let Some(prebaked) = prebaked_image(config).filter(|prebaked| *prebaked != wanted) else {
        return Err(ImageError::Pull { image: wanted, source });
    };
    let Some(image) = engine.find_image(prebaked.as_str()).await? else {
        return Err(ImageError::NoPrebaked { image: wanted, prebaked, source });
    };
    tracing::warn!(
        image = %wanted,
        prebaked = %prebaked,
        "cannot pull the image {wanted}: {}; using the prebaked image {prebaked}",
        error_chain(&source)
    );
    Ok(framework_image(prebaked, &image))
}

fn framework_image(reference: ImageRef, image: &Image) -> FrameworkImage {
    FrameworkImage { reference, python_path: image.variable("PYTHONPATH") }
}

/// Returns the image by its name, or by its ID if the running container was created from that name
/// and the name was removed since.
async fn find_local(
    engine: &Client,
    wanted: &ImageRef,
    container: &str,
) -> Result<Option<Image>, EngineError> {
    if let Some(image) = engine.find_image(wanted.as_str()).await? {
        return Ok(Some(image));
    }
    match engine.inspect_container(container).await? {
        Some(container) if container.running && container.image == wanted.as_str() => {
            engine.find_image(&container.image_id).await
        }
        _ => Ok(None),
    }
}

async fn pull(engine: &Client, image: &ImageRef, reporter: &Reporter) -> Result<(), EngineError> {
    let step = format!("Pulling {image}");
    reporter.set_step(&step);
    tracing::info!(image = %image, "pulling the image {image}");
    engine.pull(image, |progress| reporter.set_progress(&step, &progress)).await
}
