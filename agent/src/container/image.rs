//! Selection of the framework image. Pure: whether Docker has the image, or can pull it, is decided
//! in `daemon::image`.

use crate::config::{Config, Framework};
use crate::values::{ImageRef, Version};

/// The image that the framework container is created from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FrameworkImage {
    pub reference: ImageRef,
    /// `PYTHONPATH` as set in the image.
    pub python_path: Option<String>,
}

/// Returns the image that the configuration specifies.
pub(crate) fn wanted_image(config: &Config) -> ImageRef {
    config.image.clone().unwrap_or_else(|| image_of(config.framework, &config.version))
}

/// Returns the image that was installed when the VM image was built. It is used if the wanted one
/// cannot be pulled. `FL_SUPERNODE_IMAGE` has no replacement.
pub(crate) fn prebaked_image(config: &Config) -> Option<ImageRef> {
    config.image.is_none().then(|| image_of(config.prebaked.framework, &config.prebaked.version))
}

/// Returns the Flower release in `image`. For `FL_SUPERNODE_IMAGE` this is FLOWER_VERSION, or the
/// prebaked version if that is unset.
pub(crate) fn flower_version<'a>(config: &'a Config, image: &ImageRef) -> &'a Version {
    if prebaked_image(config).as_ref() == Some(image) {
        &config.prebaked.version
    } else {
        &config.version
    }
}

fn image_of(framework: Framework, version: &Version) -> ImageRef {
    match framework {
        Framework::Base => ImageRef::from_name_and_version("flwr/supernode", version),
        framework => {
            ImageRef::from_name_and_version(&format!("flower-supernode-{framework}"), version)
        }
    }
}

#[cfg(test)]
mod tests {
    use one_context::Context;

    use super::*;
    use crate::config::Prebaked;

    #[test]
    fn image_follows_framework_and_version() {
        for (context, image) in [
            ("", "flower-supernode-pytorch:1.31.0"),
            (
                "ML_FRAMEWORK='TensorFlow'\nFLOWER_VERSION='1.25.0'\n",
                "flower-supernode-tensorflow:1.25.0",
            ),
            ("FL_FRAMEWORK='base'\n", "flwr/supernode:1.31.0"),
            ("FL_SUPERNODE_IMAGE='host:5000/own:2'\n", "host:5000/own:2"),
        ] {
            let context = Context::parse(context.as_bytes()).unwrap();
            let (config, _) = Config::from_context(&context, &Prebaked::default()).unwrap();
            assert_eq!(wanted_image(&config).as_str(), image);
        }
    }

    #[test]
    fn invalid_image_reference_is_rejected() {
        let context = Context::parse(b"FL_SUPERNODE_IMAGE='host:5000/own@sha256'\n").unwrap();
        assert!(Config::from_context(&context, &Prebaked::default()).is_err());
    }

    #[test]
    fn operator_image_has_no_prebaked_replacement() {
        let context = Context::parse(b"FL_SUPERNODE_IMAGE='host:5000/own:2'\n").unwrap();
        let (config, _) = Config::from_context(&context, &Prebaked::default()).unwrap();
        assert_eq!(prebaked_image(&config), None);
    }
}
