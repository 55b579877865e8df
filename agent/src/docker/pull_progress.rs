//! Progress of a pull: Docker reports each layer, the agent reports the image.

use std::collections::BTreeMap;

/// Progress of all layers of an image.
#[derive(Debug, Default)]
pub(crate) struct PullProgress {
    layers: BTreeMap<String, Layer>,
}

/// A layer that was not present locally. Sizes are compressed bytes.
#[derive(Debug, Clone, Copy, Default)]
struct Layer {
    downloaded: u64,
    /// Reported once the download of the layer has begun.
    size: Option<u64>,
    is_downloaded: bool,
    is_extracted: bool,
}

impl PullProgress {
    /// Processes one message of Docker: layer ID, status, and bytes (current, total). The statuses
    /// are those of moby/moby, distribution/pull_v2.go and distribution/xfer/download.go.
    pub(crate) fn update(&mut self, id: &str, status: &str, bytes: Option<(u64, u64)>) {
        if status == "Already exists" {
            self.layers.remove(id);
            return;
        }
        if !self.layers.contains_key(id)
            && !matches!(status, "Pulling fs layer" | "Waiting" | "Downloading")
        {
            // A message about the tag or the digest of the image.
            return;
        }
        let layer = self.layers.entry(id.to_owned()).or_default();
        match (status, bytes) {
            ("Downloading", Some((current, total))) if total > 0 => {
                (layer.downloaded, layer.size) = (current.min(total), Some(total));
            }
            // These count from zero again, and some engines use other units.
            ("Verifying Checksum" | "Download complete" | "Extracting", _) => {
                layer.is_downloaded = true
            }
            ("Pull complete", _) => (layer.is_downloaded, layer.is_extracted) = (true, true),
            _ => {}
        }
    }

    /// Returns the progress as text; `None` while it is unknown.
    pub(crate) fn summary(&self) -> Option<String> {
        if self.layers.is_empty() {
            return None;
        }
        let layers = || self.layers.values();
        if layers().all(|layer| layer.is_downloaded) {
            let (extracted, all) =
                (layers().filter(|layer| layer.is_extracted).count(), self.layers.len());
            return Some(format!("download complete, {extracted} of {all} layers extracted"));
        }
        let downloaded: u64 = layers()
            .map(
                |layer| {
                    if layer.is_downloaded { layer.size.unwrap_or(0) } else { layer.downloaded }
                },
            )
            .sum();
        let size: u64 = layers().filter_map(|layer| layer.size).sum();
        let (percent, mib) = ((downloaded * 100).checked_div(size)?, size.div_ceil(1 << 20));
        // Docker downloads a few layers at a time; the sizes of the others are still unknown.
        let is_complete = layers().all(|layer| layer.size.is_some() || layer.is_downloaded);
        let qualifier = if is_complete { "" } else { "at least " };
        Some(format!("{percent} % of {qualifier}{mib} MiB"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    type Message = (&'static str, &'static str, Option<(u64, u64)>);

    fn after(messages: &[Message]) -> Option<String> {
        let mut progress = PullProgress::default();
        for (id, status, bytes) in messages {
            progress.update(id, status, *bytes);
        }
        progress.summary()
    }

    #[test]
    fn progress_sums_up_all_layers() {
        let mut progress = PullProgress::default();
        let mut update = |id: &str, status: &str, bytes| {
            progress.update(id, status, bytes);
            progress.summary()
        };
        assert_eq!(update("1.31.0", "Pulling from flwr/supernode", None), None);
        assert_eq!(update("a", "Pulling fs layer", None), None);
        assert_eq!(update("b", "Pulling fs layer", None), None);
        let expected = |text: &str| Some(text.to_owned());
        assert_eq!(
            update("a", "Downloading", Some((30 * MIB, 100 * MIB))),
            expected("30 % of at least 100 MiB")
        );
        assert_eq!(update("b", "Downloading", Some((0, 300 * MIB))), expected("7 % of 400 MiB"));
        assert_eq!(update("a", "Download complete", None), expected("25 % of 400 MiB"));
        // Extraction counts from zero again and does not reduce the progress.
        assert_eq!(update("a", "Extracting", Some((1, 100 * MIB))), expected("25 % of 400 MiB"));
        assert_eq!(update("a", "Pull complete", None), expected("25 % of 400 MiB"));
        assert_eq!(
            update("b", "Verifying Checksum", None),
            expected("download complete, 1 of 2 layers extracted")
        );
        assert_eq!(
            update("b", "Pull complete", None),
            expected("download complete, 2 of 2 layers extracted")
        );
        let digest = update("", "Digest: sha256:00", None);
        assert_eq!(digest, expected("download complete, 2 of 2 layers extracted"));
    }

    #[test]
    fn existing_layers_are_not_counted() {
        let messages = [("a", "Pulling fs layer", None), ("a", "Already exists", None)];
        assert_eq!(after(&messages), None);
    }

    #[test]
    fn size_of_a_finished_layer_may_be_unknown() {
        let messages = [
            ("a", "Pulling fs layer", None),
            ("b", "Pulling fs layer", None),
            ("a", "Download complete", None),
            ("b", "Downloading", Some((MIB / 2, MIB))),
        ];
        assert_eq!(after(&messages).as_deref(), Some("50 % of 1 MiB"));
    }

    #[test]
    fn progress_never_exceeds_hundred_percent() {
        let messages = [("a", "Downloading", Some((7, 5))), ("b", "Downloading", Some((0, 0)))];
        assert_eq!(after(&messages).as_deref(), Some("100 % of at least 1 MiB"));
    }
}
