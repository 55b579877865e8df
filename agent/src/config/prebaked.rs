use std::io;
use std::path::Path;

use super::choices::Framework;
use super::error::{ConfigError, ConfigErrors};
use super::kind::Kind;
use crate::values::{ValidationError, Version};

/// Flower release and framework of the image that the image build left on this machine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prebaked {
    /// Flower release.
    pub version: Version,
    /// Framework.
    pub framework: Framework,
}

impl Prebaked {
    /// Reads `PREBAKED_VERSION` and `PREBAKED_FRAMEWORK` in `dir`; a missing file means the
    /// default.
    ///
    /// # Errors
    /// When a file cannot be read, or its content is not accepted.
    pub fn read(dir: &Path) -> Result<Self, ConfigErrors> {
        let version = read_value(&dir.join("PREBAKED_VERSION"), Kind::Version, Version::parse);
        let framework = read_value(
            &dir.join("PREBAKED_FRAMEWORK"),
            Kind::Choice(Framework::WORDS),
            Framework::parse,
        );
        match (version, framework) {
            (Ok(version), Ok(framework)) => Ok(Self { version, framework }),
            (version, framework) => {
                Err(ConfigErrors(version.err().into_iter().chain(framework.err()).collect()))
            }
        }
    }
}

fn read_value<T: Default>(
    path: &Path,
    kind: Kind,
    parse: impl FnOnce(&str) -> Result<T, ValidationError>,
) -> Result<T, ConfigError> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(T::default()),
        Err(error) => return Err(ConfigError::UnreadableFile { path: path.into(), error }),
    };
    let text = text.trim();
    parse(text).map_err(|reason| ConfigError::InvalidFile {
        path: path.into(),
        value: kind.quote(text),
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_image_build_are_validated() {
        let dir = std::env::temp_dir().join(format!("sn-prebaked-{}", std::process::id()));
        let read = || Prebaked::read(&dir);
        assert_eq!(read().unwrap(), Prebaked::default(), "without the files");
        std::fs::create_dir_all(&dir).unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.join(name), text).unwrap();
        write("PREBAKED_VERSION", "1.25.0\n");
        write("PREBAKED_FRAMEWORK", "TensorFlow\n");
        let expected =
            Prebaked { version: Version::new(1, 25, 0), framework: Framework::TensorFlow };
        assert_eq!(read().unwrap(), expected);
        write("PREBAKED_VERSION", "latest");
        write("PREBAKED_FRAMEWORK", "jax");
        let path = dir.display();
        assert_eq!(
            read().unwrap_err().to_string(),
            format!(
                "{path}/PREBAKED_VERSION: 'latest' must be a Flower release X.Y.Z, such as 1.31.0\n\
                 {path}/PREBAKED_FRAMEWORK: 'jax' must be one of pytorch, tensorflow, sklearn, base"
            )
        );
        std::fs::remove_dir_all(&dir).unwrap();
        // A directory in place of a file.
        std::fs::create_dir_all(dir.join("PREBAKED_VERSION")).unwrap();
        let error = read().unwrap_err().to_string();
        assert!(error.starts_with(&format!("{path}/PREBAKED_VERSION: ")), "{error}");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
