//! Which share of the data a node of a service takes: `partition-id` and `num-partitions` of its
//! node configuration.
//!
//! The place in the list of the service's VMs would not do: it moves when a VM before it is
//! replaced, and then two nodes train on one share. OneFlow gives every VM of a role a number that
//! it never gives again, in the VM's name (`supernode_3_(service_7)`:
//! `$ROLE_NAME_$VM_NUMBER_(service_$SERVICE_ID)` in oneflow-server.conf). As long as nobody has
//! been replaced these numbers are the ids: no node needs to know what another one took, whatever
//! is scaled while they boot. A node that comes after a replacement takes an id that nobody has
//! published, publishes it, and looks whether somebody else has published the same: two nodes that
//! publish and then look cannot both overlook the other. What a node has taken it keeps.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use one_context::onegate::{Node, OneGate, OneGateError, Role, Service};
use serde::{Deserialize, Serialize};

use crate::config::settings::Settings;
use crate::system::atomic_file;

/// The attribute by which the nodes of a service tell each other what they took.
pub const ATTRIBUTE: &str = "FL_PARTITION_ID";
/// The attribute that says for which VM the others were published: a VM that is made from a saved
/// one inherits them.
pub const OWNER_ATTRIBUTE: &str = "FL_NODE_ID";

/// More than a service has nodes: what is published beyond it is not believed.
const MAX_IDS: u64 = 1 << 20;
/// How often a node that meets another with its id takes another one.
const MAX_ATTEMPTS: u32 = 5;

/// A share of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partition {
    /// From 0, less than `count`.
    pub id: u64,
    /// How many shares there are, as this node counts.
    pub count: u64,
}

/// What is kept on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PartitionRecord {
    vm_id: u64,
    service_id: u64,
    /// The boot in which the shares were counted.
    boot_id: String,
    partition: Partition,
}

/// Where the partition of one VM is kept.
#[derive(Debug, Clone)]
pub struct PartitionStore {
    file: PathBuf,
    vm_id: u64,
    boot_id: String,
}

impl PartitionStore {
    /// In the folder of the settings, for this VM in this boot.
    pub fn of(settings: &Settings, vm_id: u64) -> Self {
        let boot_id =
            std::fs::read_to_string(settings.machine.root.join("proc/sys/kernel/random/boot_id"));
        Self::new(&settings.state.lasting_dir, vm_id, &boot_id.unwrap_or_default())
    }

    /// In `folder`, for this VM in this boot.
    fn new(folder: &Path, vm_id: u64, boot_id: &str) -> Self {
        Self { file: folder.join("partition.json"), vm_id, boot_id: boot_id.trim().to_owned() }
    }

    /// What was kept for this VM; a disk that was copied from another VM's does not count.
    fn kept(&self) -> Option<PartitionRecord> {
        let kept: PartitionRecord =
            serde_json::from_slice(&std::fs::read(&self.file).ok()?).ok()?;
        (kept.vm_id == self.vm_id && kept.partition.id < kept.partition.count).then_some(kept)
    }

    /// The partition that this VM took in this boot: an agent that is started again changes nothing
    /// for its container.
    pub fn of_this_boot(&self) -> Option<Partition> {
        self.kept().filter(|kept| kept.boot_id == self.boot_id).map(|kept| kept.partition)
    }

    fn keep(&self, service_id: u64, partition: Partition) {
        let (vm_id, boot_id) = (self.vm_id, self.boot_id.clone());
        let kept = PartitionRecord { vm_id, service_id, boot_id, partition };
        // A structure of numbers and texts always has a JSON.
        let text = serde_json::to_string(&kept).unwrap_or_default();
        if let Err(error) = atomic_file::replace(&self.file, text.as_bytes()) {
            tracing::warn!(
                "cannot write {}: {error}; after a reboot this node may take another partition than {}",
                self.file.display(),
                partition.id
            );
        }
    }
}

/// The partition of `service` that this VM has without asking anybody: the one that it took before,
/// else its number. `None` where no role has this VM, or others must be asked.
pub fn known(service: &Service, keeper: &PartitionStore) -> Option<Partition> {
    let role = role_of(service, keeper.vm_id)?;
    let kept =
        keeper.kept().filter(|kept| kept.service_id == service.id).map(|kept| kept.partition.id);
    Some(with_count(kept.or_else(|| by_number(role, keeper.vm_id))?, count_of(role)))
}

/// Takes a partition of `service` for this VM, or the one that it took before, and keeps it. `None`
/// where no role has this VM.
///
/// # Errors
/// Of OneGate, where it is needed to ask what other nodes took.
pub async fn take(
    gate: &OneGate,
    service: &Service,
    keeper: &PartitionStore,
) -> Result<Option<Partition>, OneGateError> {
    let partition = match known(service, keeper) {
        Some(partition) => Some(partition),
        None => claim(gate, keeper.vm_id).await?,
    };
    if let Some(partition) = partition {
        keeper.keep(service.id, partition);
    }
    Ok(partition)
}

/// Takes an id that nobody has, publishes it, and looks again.
async fn claim(gate: &OneGate, vm_id: u64) -> Result<Option<Partition>, OneGateError> {
    let mut service = gate.service_with_attributes().await?;
    let mut round = 0;
    loop {
        let Some(role) = role_of(&service, vm_id) else {
            return Ok(None);
        };
        let partition = free_partition(role, vm_id);
        gate.publish(&[
            (OWNER_ATTRIBUTE, vm_id.to_string()),
            (ATTRIBUTE, partition.id.to_string()),
        ])
        .await?;
        service = gate.service_with_attributes().await?;
        let others =
            role_of(&service, vm_id).map(|role| taken(role, Some(vm_id))).unwrap_or_default();
        if !others.contains(&partition.id) {
            return Ok(Some(partition));
        }
        round += 1;
        if round == MAX_ATTEMPTS {
            tracing::warn!(
                "another node of the service has the partition {} as well",
                partition.id
            );
            return Ok(Some(partition));
        }
        // Not at the same time as the other one.
        tokio::time::sleep(Duration::from_millis(fastrand::u64(200..2000))).await;
    }
}

fn role_of(service: &Service, vm_id: u64) -> Option<&Role> {
    service.roles.iter().find(|role| role.nodes.iter().any(|node| node.vm_id == vm_id))
}

/// How many nodes a role has, or is to have.
fn count_of(role: &Role) -> u64 {
    role.cardinality.unwrap_or(0).max(role.nodes.len() as u64)
}

/// An id is always less than the count, however the service shrank.
fn with_count(id: u64, count: u64) -> Partition {
    Partition { id, count: count.max(id + 1) }
}

/// The number that OneFlow gave to a VM.
fn number_of(role: &Role, node: &Node) -> Option<u64> {
    let rest = node.name.as_deref()?.strip_prefix(role.name.as_str())?.strip_prefix('_')?;
    let (number, _) = rest.split_once("_(service_")?;
    number.parse().ok().filter(|number| *number < MAX_IDS)
}

/// This VM's number, where nobody has ever been replaced: the numbers of the role begin with 0 and
/// leave none out.
fn by_number(role: &Role, vm_id: u64) -> Option<u64> {
    let numbers: Option<BTreeSet<u64>> =
        role.nodes.iter().map(|node| number_of(role, node)).collect();
    let numbers = numbers.filter(|numbers| numbers.len() == role.nodes.len())?;
    let complete = numbers.last() == Some(&(numbers.len() as u64 - 1));
    let own = role.nodes.iter().find(|node| node.vm_id == vm_id)?;
    number_of(role, own).filter(|_| complete)
}

/// The id that a node has published for itself.
fn published(node: &Node) -> Option<u64> {
    let number = |name: &str| node.attributes.get(name)?.trim().parse::<u64>().ok();
    number(ATTRIBUTE).filter(|id| *id < MAX_IDS && number(OWNER_ATTRIBUTE) == Some(node.vm_id))
}

/// The ids that the nodes of a role have published, but for one node.
fn taken(role: &Role, but: Option<u64>) -> BTreeSet<u64> {
    role.nodes.iter().filter(|node| Some(node.vm_id) != but).filter_map(published).collect()
}

/// What this VM takes, as far as the list tells. Whoever has published an id has it. Of the others
/// those whose number is still within the count have that, and what is left over goes by the order
/// of the VMs: nodes that see the same list agree.
fn free_partition(role: &Role, vm_id: u64) -> Partition {
    let count = count_of(role);
    let others = taken(role, Some(vm_id));
    let own = role.nodes.iter().find(|node| node.vm_id == vm_id);
    if let Some(id) = own.and_then(published).filter(|id| !others.contains(id)) {
        return with_count(id, count);
    }
    let mut free: BTreeSet<u64> = (0..count).filter(|id| !others.contains(id)).collect();
    let mut without: Vec<&Node> =
        role.nodes.iter().filter(|node| node.vm_id == vm_id || published(node).is_none()).collect();
    without.sort_by_key(|node| node.vm_id);
    let mut unassigned = Vec::new();
    for node in without {
        match number_of(role, node).filter(|number| free.remove(number)) {
            Some(number) if node.vm_id == vm_id => return with_count(number, count),
            Some(_) => {}
            None => unassigned.push(node.vm_id),
        }
    }
    let place = unassigned.iter().position(|id| *id == vm_id).unwrap_or(0);
    // More published ids than nodes: those of VMs that have gone are not in the list, those of
    // liars may be.
    let id =
        free.into_iter().nth(place).unwrap_or_else(|| others.last().map_or(0, |last| last + 1));
    with_count(id, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A role of VMs: number of the VM, its number in OneFlow, the id that it has published.
    fn role(vms: &[(u64, u64, Option<u64>)]) -> Role {
        let node = |(vm_id, number, id): &(u64, u64, Option<u64>)| {
            let attributes =
                id.map(|id| [(ATTRIBUTE, id.to_string()), (OWNER_ATTRIBUTE, vm_id.to_string())]);
            Node {
                vm_id: *vm_id,
                name: Some(format!("supernode_{number}_(service_7)")),
                attributes: attributes
                    .into_iter()
                    .flatten()
                    .map(|(name, value)| (name.to_owned(), value))
                    .collect(),
            }
        };
        Role { name: "supernode".into(), cardinality: None, nodes: vms.iter().map(node).collect() }
    }

    #[test]
    fn while_nobody_was_replaced_the_number_is_the_id_whatever_is_added() {
        let small = role(&[(101, 0, None), (102, 1, None)]);
        let grown = role(&[(103, 2, None), (101, 0, None), (102, 1, None)]);
        for vm in [101, 102] {
            assert_eq!(by_number(&small, vm), by_number(&grown, vm));
        }
        assert_eq!(by_number(&grown, 103), Some(2));
    }

    #[test]
    fn a_gap_or_a_name_of_another_form_says_nothing() {
        assert_eq!(by_number(&role(&[(102, 1, None), (103, 2, None)]), 103), None);
        let mut named = role(&[(101, 0, None)]);
        for name in ["gpu-node", "supernode_x_(service_7)", "supernode_0", "supernode"] {
            named.nodes[0].name = Some(name.into());
            assert_eq!(by_number(&named, 101), None, "{name}");
        }
        named.nodes[0].name = None;
        assert_eq!(by_number(&named, 101), None);
        assert_eq!(
            by_number(&role(&[(101, 0, None), (102, 0, None)]), 101),
            None,
            "one number twice"
        );
    }

    #[test]
    fn who_comes_for_one_that_went_takes_what_is_free() {
        // 101 was replaced by 103; 102 is where it was.
        let now = role(&[(102, 1, Some(1)), (103, 2, None)]);
        assert_eq!(free_partition(&now, 103), Partition { id: 0, count: 2 });
    }

    #[test]
    fn several_that_come_together_agree() {
        let now = role(&[(102, 2, None), (104, 4, None), (103, 3, None)]);
        let ids: Vec<u64> = [102, 103, 104].iter().map(|vm| free_partition(&now, *vm).id).collect();
        assert_eq!(ids, [2, 0, 1], "2 is still a number of this count");
    }

    #[test]
    fn what_was_published_for_another_vm_does_not_count() {
        let mut copied = role(&[(102, 1, Some(0)), (103, 2, None)]);
        copied.nodes[0].attributes.insert(OWNER_ATTRIBUTE.into(), "55".into());
        assert_eq!(free_partition(&copied, 103).id, 0);
    }

    #[test]
    fn an_id_is_less_than_the_count_even_where_others_lie() {
        let full = role(&[(102, 1, Some(0)), (103, 2, Some(1)), (104, 3, None), (105, 4, Some(2))]);
        for vms in [
            full,
            role(&[(1, 9, Some(u64::MAX)), (2, 9, Some(0)), (3, 9, Some(1)), (4, 9, Some(2))]),
        ] {
            for node in &vms.nodes {
                let partition = free_partition(&vms, node.vm_id);
                assert!(partition.id < partition.count, "{partition:?}");
            }
        }
    }

    #[test]
    fn no_two_nodes_that_see_one_list_take_one_id() {
        proptest::proptest!(|(vms in proptest::collection::btree_map(1..60_u64, (0..60_u64, proptest::option::of(0..8_u64)), 1..9))| {
            let mut seen = BTreeSet::new();
            let vms: Vec<_> = vms
                .into_iter()
                .enumerate()
                // OneFlow's numbers grow with the VMs, and each is given once; ids that were
                // published are published once.
                .map(|(place, (vm, (more, id)))| (vm, place as u64 * 60 + more, id.filter(|id| seen.insert(*id))))
                .collect();
            let role = role(&vms);
            let ids: BTreeSet<u64> = vms.iter().map(|(vm, ..)| free_partition(&role, *vm).id).collect();
            proptest::prop_assert_eq!(ids.len(), vms.len());
        });
    }

    #[test]
    fn what_was_taken_is_kept_for_this_vm_and_counted_anew_at_a_reboot() {
        let folder = std::env::temp_dir().join(format!("sn-partition-{}", std::process::id()));
        let partition = Partition { id: 1, count: 2 };
        PartitionStore::new(&folder, 102, "boot-1\n").keep(7, partition);
        assert_eq!(PartitionStore::new(&folder, 102, "boot-1").of_this_boot(), Some(partition));
        assert_eq!(PartitionStore::new(&folder, 102, "boot-2").of_this_boot(), None);
        assert_eq!(
            PartitionStore::new(&folder, 102, "boot-2").kept().map(|kept| kept.partition),
            Some(partition)
        );
        assert_eq!(PartitionStore::new(&folder, 103, "boot-1").kept(), None, "a copied disk");
        std::fs::write(folder.join("partition.json"), "{").unwrap();
        assert_eq!(PartitionStore::new(&folder, 102, "boot-1").kept(), None);
        std::fs::remove_dir_all(folder).unwrap();
    }

    fn service(id: u64, roles: Vec<Role>) -> Service {
        Service { id, name: "flower".into(), roles }
    }

    #[test]
    fn what_is_known_without_asking_is_what_was_taken_in_this_service_and_else_the_number() {
        let folder =
            std::env::temp_dir().join(format!("sn-partition-known-{}", std::process::id()));
        let keeper = PartitionStore::new(&folder, 102, "boot-1");
        let other = Role { name: "superlink".into(), ..role(&[(100, 0, None)]) };
        let now = service(7, vec![other.clone(), role(&[(101, 0, None), (102, 1, None)])]);
        assert_eq!(known(&now, &keeper), Some(Partition { id: 1, count: 2 }));
        assert_eq!(known(&service(7, vec![other]), &keeper), None, "no role has this VM");
        let gap = service(7, vec![role(&[(102, 1, None), (103, 2, None)])]);
        assert_eq!(known(&gap, &keeper), None, "others must be asked");
        keeper.keep(7, Partition { id: 5, count: 6 });
        assert_eq!(
            known(&now, &keeper),
            Some(Partition { id: 5, count: 6 }),
            "also where the service shrank"
        );
        assert_eq!(known(&service(8, now.roles), &keeper), Some(Partition { id: 1, count: 2 }));
        // A file that nobody wrote like this.
        keeper.keep(7, Partition { id: 6, count: 6 });
        assert_eq!(keeper.kept(), None);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_number_beyond_any_service_is_not_believed() {
        let most = MAX_IDS - 1;
        let numbered = |number| role(&[(101, number, None)]);
        assert_eq!(number_of(&numbered(most), &numbered(most).nodes[0]), Some(most));
        assert_eq!(number_of(&numbered(MAX_IDS), &numbered(MAX_IDS).nodes[0]), None);
        let with_id = |id| role(&[(101, 0, Some(id))]);
        assert_eq!(published(&with_id(most).nodes[0]), Some(most));
        assert_eq!(published(&with_id(MAX_IDS).nodes[0]), None);
    }

    #[test]
    fn a_node_that_has_published_an_id_keeps_it() {
        let now = role(&[(102, 5, Some(1)), (103, 6, None)]);
        assert_eq!(free_partition(&now, 102), Partition { id: 1, count: 2 });
        assert_eq!(free_partition(&now, 103), Partition { id: 0, count: 2 });
    }
}
