//! How far a pull is: Docker tells of each layer of the image, a person wants to know of the image.

use std::collections::BTreeMap;

/// What Docker has told of the layers so far.
#[derive(Debug, Default)]
pub struct PullProgress {
    layers: BTreeMap<String, Layer>,
}

/// A layer that the machine lacked. Sizes are in bytes, packed as they come over the network.
#[derive(Debug, Clone, Copy, Default)]
struct Layer {
    loaded: u64,
    /// Docker tells it once the layer's own download has begun.
    size: Option<u64>,
    is_loaded: bool,
    is_unpacked: bool,
}

impl PullProgress {
    /// Takes one message of Docker: the layer's id, the status, and the bytes that it counts
    /// (current, total). The statuses are those of moby/moby, distribution/pull_v2.go and
    /// distribution/xfer/download.go.
    pub fn take(&mut self, id: &str, status: &str, bytes: Option<(u64, u64)>) {
        if status == "Already exists" {
            self.layers.remove(id);
            return;
        }
        if !self.layers.contains_key(id)
            && !matches!(status, "Pulling fs layer" | "Waiting" | "Downloading")
        {
            // The image's tag and digest have messages as well.
            return;
        }
        let layer = self.layers.entry(id.to_owned()).or_default();
        match (status, bytes) {
            ("Downloading", Some((current, total))) if total > 0 => {
                (layer.loaded, layer.size) = (current.min(total), Some(total));
            }
            // Its bytes are counted anew, and in other units by some engines.
            ("Verifying Checksum" | "Download complete" | "Extracting", _) => {
                layer.is_loaded = true
            }
            ("Pull complete", _) => (layer.is_loaded, layer.is_unpacked) = (true, true),
            _ => {}
        }
    }

    /// How far it is, in a few words; `None` as long as nothing is known.
    pub fn progress(&self) -> Option<String> {
        if self.layers.is_empty() {
            return None;
        }
        let layers = || self.layers.values();
        if layers().all(|layer| layer.is_loaded) {
            let (unpacked, all) =
                (layers().filter(|layer| layer.is_unpacked).count(), self.layers.len());
            return Some(format!("all of it is here, {unpacked} of {all} layers are unpacked"));
        }
        let loaded: u64 = layers()
            .map(|layer| if layer.is_loaded { layer.size.unwrap_or(0) } else { layer.loaded })
            .sum();
        let size: u64 = layers().filter_map(|layer| layer.size).sum();
        let (percent, mib) = ((loaded * 100).checked_div(size)?, size.div_ceil(1 << 20));
        // A few layers are loaded at a time: the others' sizes are still to come.
        let is_whole = layers().all(|layer| layer.size.is_some() || layer.is_loaded);
        let least = if is_whole { "" } else { "at least " };
        Some(format!("{percent} % of {least}{mib} MiB"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    type Step = (&'static str, &'static str, Option<(u64, u64)>);

    fn after(steps: &[Step]) -> Option<String> {
        let mut pull = PullProgress::default();
        for (id, status, bytes) in steps {
            pull.take(id, status, *bytes);
        }
        pull.progress()
    }

    #[test]
    fn the_progress_is_that_of_all_layers_together() {
        let mut pull = PullProgress::default();
        let mut take = |id: &str, status: &str, bytes| {
            pull.take(id, status, bytes);
            pull.progress()
        };
        assert_eq!(take("1.31.0", "Pulling from flwr/supernode", None), None);
        assert_eq!(take("a", "Pulling fs layer", None), None);
        assert_eq!(take("b", "Pulling fs layer", None), None);
        let said = |text: &str| Some(text.to_owned());
        assert_eq!(
            take("a", "Downloading", Some((30 * MIB, 100 * MIB))),
            said("30 % of at least 100 MiB")
        );
        assert_eq!(take("b", "Downloading", Some((0, 300 * MIB))), said("7 % of 400 MiB"));
        assert_eq!(take("a", "Download complete", None), said("25 % of 400 MiB"));
        // Unpacking counts from nothing again, and takes nothing back.
        assert_eq!(take("a", "Extracting", Some((1, 100 * MIB))), said("25 % of 400 MiB"));
        assert_eq!(take("a", "Pull complete", None), said("25 % of 400 MiB"));
        assert_eq!(
            take("b", "Verifying Checksum", None),
            said("all of it is here, 1 of 2 layers are unpacked")
        );
        assert_eq!(
            take("b", "Pull complete", None),
            said("all of it is here, 2 of 2 layers are unpacked")
        );
        let digest = take("", "Digest: sha256:00", None);
        assert_eq!(digest, said("all of it is here, 2 of 2 layers are unpacked"));
    }

    #[test]
    fn a_layer_that_the_machine_has_counts_for_nothing() {
        let steps = [("a", "Pulling fs layer", None), ("a", "Already exists", None)];
        assert_eq!(after(&steps), None);
    }

    #[test]
    fn a_layer_that_came_at_once_has_no_size_and_makes_the_rest_no_uncertainty() {
        let steps = [
            ("a", "Pulling fs layer", None),
            ("b", "Pulling fs layer", None),
            ("a", "Download complete", None),
            ("b", "Downloading", Some((MIB / 2, MIB))),
        ];
        assert_eq!(after(&steps).as_deref(), Some("50 % of 1 MiB"));
    }

    #[test]
    fn an_engine_that_counts_more_than_there_is_stays_within_a_hundred() {
        let steps = [("a", "Downloading", Some((7, 5))), ("b", "Downloading", Some((0, 0)))];
        assert_eq!(after(&steps).as_deref(), Some("100 % of at least 1 MiB"));
    }
}
