//! The data partition of a node in a service: `partition-id` and `num-partitions` of its node
//! configuration.
//!
//! The position in the service's list of VMs cannot be the ID: it shifts when an earlier VM is
//! replaced, and then two nodes train on one partition. OneFlow instead gives every VM of a role a
//! number that it never reuses, in the VM's name (`supernode_3_(service_7)`:
//! `$ROLE_NAME_$VM_NUMBER_(service_$SERVICE_ID)` in oneflow-server.conf). As long as no VM has been
//! replaced, these numbers are the IDs: a node needs no data from the others, even while the role
//! is scaled during boot. A node that replaces another takes an ID that no node has published,
//! publishes it, then reads the service again and retries if another node published the same ID.
//! Because each node publishes before it reads, at least one of two conflicting nodes sees the
//! other. A node keeps the ID that it acquired.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use one_context::onegate::{OneGate, OneGateError, Role, RoleVm, Service};
use serde::{Deserialize, Serialize};

use crate::config::settings::Settings;
use crate::system::atomic_file;

/// Attribute with the partition ID that a node acquired.
pub(crate) const ATTRIBUTE: &str = "FL_PARTITION_ID";
/// Attribute with the ID of the VM that published the other attributes. A VM instantiated from a
/// saved VM inherits the attributes of that VM.
pub(crate) const OWNER_ATTRIBUTE: &str = "FL_NODE_ID";

/// Exclusive upper bound of OneFlow numbers and published IDs, above the size of any service.
/// Larger ones are ignored.
const MAX_IDS: u64 = 1 << 20;
/// Attempts to find an ID that no other node has published.
const MAX_ATTEMPTS: u32 = 5;

/// A partition of the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partition {
    /// Partition ID, less than `count`.
    pub id: u64,
    /// Number of partitions, as seen by this node.
    pub count: u64,
}

/// Content of `partition.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct PartitionRecord {
    vm_id: u64,
    service_id: u64,
    /// Boot in which the partition was acquired.
    boot_id: String,
    partition: Partition,
}

/// Persistent storage of this VM's partition.
#[derive(Debug, Clone)]
pub(crate) struct PartitionStore {
    file: PathBuf,
    vm_id: u64,
    boot_id: String,
}

impl PartitionStore {
    /// Opens the store in the persistent directory for this VM and the current boot.
    pub(crate) fn open(settings: &Settings, vm_id: u64) -> Self {
        let boot_id =
            std::fs::read_to_string(settings.system.root.join("proc/sys/kernel/random/boot_id"));
        Self::new(&settings.state.persistent_dir, vm_id, &boot_id.unwrap_or_default())
    }

    fn new(dir: &Path, vm_id: u64, boot_id: &str) -> Self {
        Self { file: dir.join("partition.json"), vm_id, boot_id: boot_id.trim().to_owned() }
    }

    /// Returns the record of this VM. A record on a disk cloned from another VM is ignored.
    fn load(&self) -> Option<PartitionRecord> {
        let record: PartitionRecord =
            serde_json::from_slice(&std::fs::read(&self.file).ok()?).ok()?;
        let is_valid = record.vm_id == self.vm_id && record.partition.id < record.partition.count;
        is_valid.then_some(record)
    }

    /// Returns the partition that this VM acquired in the current boot, so that a restart of the
    /// agent leaves the container unchanged.
    pub(crate) fn current_boot_partition(&self) -> Option<Partition> {
        self.load().filter(|record| record.boot_id == self.boot_id).map(|record| record.partition)
    }

    fn save(&self, service_id: u64, partition: Partition) {
        let (vm_id, boot_id) = (self.vm_id, self.boot_id.clone());
        let record = PartitionRecord { vm_id, service_id, boot_id, partition };
        // Numbers and strings always serialise.
        let text = serde_json::to_string(&record).unwrap_or_default();
        if let Err(error) = atomic_file::replace(&self.file, text.as_bytes()) {
            tracing::warn!(
                partition = partition.id,
                "cannot write {}: {error}; this node may get a partition other than {} after a \
                 reboot",
                self.file.display(),
                partition.id
            );
        }
    }
}

/// Returns the partition of this VM in `service` if it can be determined without the IDs that other
/// nodes published: the one that it acquired before, else its OneFlow number. `None` if those IDs
/// are required, or if no role contains this VM.
pub(crate) fn known_partition(service: &Service, store: &PartitionStore) -> Option<Partition> {
    let role = role_of(service, store.vm_id)?;
    let record = store.load().filter(|record| record.service_id == service.id);
    let id = record
        .map(|record| record.partition.id)
        .or_else(|| id_from_vm_number(role, store.vm_id))?;
    Some(with_count(id, count_of(role)))
}

/// Acquires a partition of `service` for this VM and saves it. `None` if no role contains this VM.
///
/// # Errors
/// If the IDs of other nodes are required and a OneGate request for them fails.
pub(crate) async fn acquire(
    onegate: &OneGate,
    service: &Service,
    store: &PartitionStore,
) -> Result<Option<Partition>, OneGateError> {
    let partition = match known_partition(service, store) {
        Some(partition) => Some(partition),
        None => claim(onegate, store.vm_id).await?,
    };
    if let Some(partition) = partition {
        store.save(service.id, partition);
    }
    Ok(partition)
}

/// Publishes an unused ID until no other node has published the same one.
async fn claim(onegate: &OneGate, vm_id: u64) -> Result<Option<Partition>, OneGateError> {
    let mut service = onegate.service_with_attributes().await?;
    let mut attempt = 0;
    loop {
        let Some(role) = role_of(&service, vm_id) else {
            return Ok(None);
        };
        let partition = choose_partition(role, vm_id);
        onegate
            .publish(&[(OWNER_ATTRIBUTE, vm_id.to_string()), (ATTRIBUTE, partition.id.to_string())])
            .await?;
        service = onegate.service_with_attributes().await?;
        let others =
            role_of(&service, vm_id).map(|role| ids_of_others(role, vm_id)).unwrap_or_default();
        if !others.contains(&partition.id) {
            return Ok(Some(partition));
        }
        attempt += 1;
        if attempt == MAX_ATTEMPTS {
            tracing::warn!(
                partition = partition.id,
                attempt,
                "another node of the service also uses partition {}; continuing with it after \
                 {MAX_ATTEMPTS} attempts to find a free one",
                partition.id
            );
            return Ok(Some(partition));
        }
        // A random delay, so that two nodes with the same ID do not retry in step.
        tokio::time::sleep(Duration::from_millis(fastrand::u64(200..2000))).await;
    }
}

fn role_of(service: &Service, vm_id: u64) -> Option<&Role> {
    service.roles.iter().find(|role| role.vms.iter().any(|node| node.vm_id == vm_id))
}

/// Number of nodes that a role has or will have.
fn count_of(role: &Role) -> u64 {
    role.cardinality.unwrap_or(0).max(role.vms.len() as u64)
}

/// Returns a partition with this ID. The count is raised above the ID, which may be larger if the
/// service was scaled down.
fn with_count(id: u64, count: u64) -> Partition {
    Partition { id, count: count.max(id + 1) }
}

/// Returns the number that OneFlow gave to a VM.
fn vm_number(role: &Role, node: &RoleVm) -> Option<u64> {
    let rest = node.name.as_deref()?.strip_prefix(role.name.as_str())?.strip_prefix('_')?;
    let (number, _) = rest.split_once("_(service_")?;
    number.parse().ok().filter(|number| *number < MAX_IDS)
}

/// Returns this VM's number if no VM of the role has been replaced: the numbers of the role start
/// at 0 without a gap.
fn id_from_vm_number(role: &Role, vm_id: u64) -> Option<u64> {
    let numbers: Option<BTreeSet<u64>> =
        role.vms.iter().map(|node| vm_number(role, node)).collect();
    let numbers = numbers.filter(|numbers| numbers.len() == role.vms.len())?;
    let is_complete = numbers.last() == Some(&(numbers.len() as u64 - 1));
    let own = role.vms.iter().find(|node| node.vm_id == vm_id)?;
    vm_number(role, own).filter(|_| is_complete)
}

/// Returns the partition ID that a node has published for itself.
fn published_id(node: &RoleVm) -> Option<u64> {
    let number = |name: &str| node.attributes.get(name)?.trim().parse::<u64>().ok();
    number(ATTRIBUTE).filter(|id| *id < MAX_IDS && number(OWNER_ATTRIBUTE) == Some(node.vm_id))
}

/// Returns the partition IDs that the other nodes of a role have published.
fn ids_of_others(role: &Role, vm_id: u64) -> BTreeSet<u64> {
    role.vms.iter().filter(|node| node.vm_id != vm_id).filter_map(published_id).collect()
}

/// Returns the partition for this VM, from the list of the role's nodes alone. A published ID
/// belongs to its node. Of the other nodes, those with a number below the count get that number,
/// and the rest get the remaining IDs in the order of their VM IDs. Nodes that see the same list
/// therefore agree.
fn choose_partition(role: &Role, vm_id: u64) -> Partition {
    let count = count_of(role);
    let others = ids_of_others(role, vm_id);
    let own = role.vms.iter().find(|node| node.vm_id == vm_id);
    if let Some(id) = own.and_then(published_id).filter(|id| !others.contains(id)) {
        return with_count(id, count);
    }
    let mut free: BTreeSet<u64> = (0..count).filter(|id| !others.contains(id)).collect();
    let mut without_id: Vec<&RoleVm> = role
        .vms
        .iter()
        .filter(|node| node.vm_id == vm_id || published_id(node).is_none())
        .collect();
    without_id.sort_by_key(|node| node.vm_id);
    let mut unassigned = Vec::new();
    for node in without_id {
        match vm_number(role, node).filter(|number| free.remove(number)) {
            Some(number) if node.vm_id == vm_id => return with_count(number, count),
            Some(_) => {}
            None => unassigned.push(node.vm_id),
        }
    }
    let index = unassigned.iter().position(|id| *id == vm_id).unwrap_or(0);
    // A node that publishes false IDs can use up all free ones. The attributes of removed VMs are
    // not in the list.
    let id =
        free.into_iter().nth(index).unwrap_or_else(|| others.last().map_or(0, |last| last + 1));
    with_count(id, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A role with these VMs: VM ID, OneFlow number, published partition ID.
    fn role(vms: &[(u64, u64, Option<u64>)]) -> Role {
        let node = |(vm_id, number, id): &(u64, u64, Option<u64>)| {
            let attributes =
                id.map(|id| [(ATTRIBUTE, id.to_string()), (OWNER_ATTRIBUTE, vm_id.to_string())]);
            RoleVm {
                vm_id: *vm_id,
                name: Some(format!("supernode_{number}_(service_7)")),
                attributes: attributes
                    .into_iter()
                    .flatten()
                    .map(|(name, value)| (name.to_owned(), value))
                    .collect(),
            }
        };
        Role { name: "supernode".into(), cardinality: None, vms: vms.iter().map(node).collect() }
    }

    #[test]
    fn number_is_the_id_until_a_vm_is_replaced() {
        let small = role(&[(101, 0, None), (102, 1, None)]);
        let grown = role(&[(103, 2, None), (101, 0, None), (102, 1, None)]);
        for vm in [101, 102] {
            assert_eq!(id_from_vm_number(&small, vm), id_from_vm_number(&grown, vm));
        }
        assert_eq!(id_from_vm_number(&grown, 103), Some(2));
    }

    #[test]
    fn gaps_and_other_names_give_no_number() {
        assert_eq!(id_from_vm_number(&role(&[(102, 1, None), (103, 2, None)]), 103), None);
        let mut named = role(&[(101, 0, None)]);
        for name in ["gpu-node", "supernode_x_(service_7)", "supernode_0", "supernode"] {
            named.vms[0].name = Some(name.into());
            assert_eq!(id_from_vm_number(&named, 101), None, "{name}");
        }
        named.vms[0].name = None;
        assert_eq!(id_from_vm_number(&named, 101), None);
        assert_eq!(
            id_from_vm_number(&role(&[(101, 0, None), (102, 0, None)]), 101),
            None,
            "duplicate number"
        );
    }

    #[test]
    fn replacement_takes_freed_partition() {
        // 103 replaces 101; 102 is unchanged.
        let now = role(&[(102, 1, Some(1)), (103, 2, None)]);
        assert_eq!(choose_partition(&now, 103), Partition { id: 0, count: 2 });
    }

    #[test]
    fn concurrent_replacements_agree() {
        let now = role(&[(102, 2, None), (104, 4, None), (103, 3, None)]);
        let ids: Vec<u64> =
            [102, 103, 104].iter().map(|vm| choose_partition(&now, *vm).id).collect();
        assert_eq!(ids, [2, 0, 1], "number 2 is still below the count");
    }

    #[test]
    fn ids_published_by_another_vm_are_ignored() {
        let mut copied = role(&[(102, 1, Some(0)), (103, 2, None)]);
        copied.vms[0].attributes.insert(OWNER_ATTRIBUTE.into(), "55".into());
        assert_eq!(choose_partition(&copied, 103).id, 0);
    }

    #[test]
    fn id_is_below_count_despite_false_published_ids() {
        let full = role(&[(102, 1, Some(0)), (103, 2, Some(1)), (104, 3, None), (105, 4, Some(2))]);
        for vms in [
            full,
            role(&[(1, 9, Some(u64::MAX)), (2, 9, Some(0)), (3, 9, Some(1)), (4, 9, Some(2))]),
        ] {
            for node in &vms.vms {
                let partition = choose_partition(&vms, node.vm_id);
                assert!(partition.id < partition.count, "{partition:?}");
            }
        }
    }

    #[test]
    fn nodes_with_the_same_list_take_different_ids() {
        let nodes = (0..60_u64, proptest::option::of(0..8_u64));
        proptest::proptest!(|(vms in proptest::collection::btree_map(1..60_u64, nodes, 1..9))| {
            let mut seen = BTreeSet::new();
            let vms: Vec<_> = vms
                .into_iter()
                .enumerate()
                // OneFlow's numbers increase with the VM IDs and are unique, as are published
                // IDs.
                .map(|(index, (vm, (offset, id)))| {
                    (vm, index as u64 * 60 + offset, id.filter(|id| seen.insert(*id)))
                })
                .collect();
            let role = role(&vms);
            let ids: BTreeSet<u64> =
                vms.iter().map(|(vm, ..)| choose_partition(&role, *vm).id).collect();
            proptest::prop_assert_eq!(ids.len(), vms.len());
        });
    }

    #[test]
    fn record_belongs_to_one_vm_and_expires_at_reboot() {
        let dir = std::env::temp_dir().join(format!("sn-partition-{}", std::process::id()));
        let partition = Partition { id: 1, count: 2 };
        PartitionStore::new(&dir, 102, "boot-1\n").save(7, partition);
        assert_eq!(
            PartitionStore::new(&dir, 102, "boot-1").current_boot_partition(),
            Some(partition)
        );
        assert_eq!(PartitionStore::new(&dir, 102, "boot-2").current_boot_partition(), None);
        assert_eq!(
            PartitionStore::new(&dir, 102, "boot-2").load().map(|record| record.partition),
            Some(partition)
        );
        assert_eq!(PartitionStore::new(&dir, 103, "boot-1").load(), None, "cloned disk");
        std::fs::write(dir.join("partition.json"), "{").unwrap();
        assert_eq!(PartitionStore::new(&dir, 102, "boot-1").load(), None);
        std::fs::remove_dir_all(dir).unwrap();
    }

    fn service(id: u64, roles: Vec<Role>) -> Service {
        Service { id, name: "flower".into(), roles }
    }

    #[test]
    fn saved_partition_wins_over_vm_number() {
        let dir = std::env::temp_dir().join(format!("sn-partition-known-{}", std::process::id()));
        let store = PartitionStore::new(&dir, 102, "boot-1");
        let other = Role { name: "superlink".into(), ..role(&[(100, 0, None)]) };
        let now = service(7, vec![other.clone(), role(&[(101, 0, None), (102, 1, None)])]);
        assert_eq!(known_partition(&now, &store), Some(Partition { id: 1, count: 2 }));
        assert_eq!(
            known_partition(&service(7, vec![other]), &store),
            None,
            "no role contains this VM"
        );
        let gap = service(7, vec![role(&[(102, 1, None), (103, 2, None)])]);
        assert_eq!(known_partition(&gap, &store), None, "others must be asked");
        store.save(7, Partition { id: 5, count: 6 });
        assert_eq!(
            known_partition(&now, &store),
            Some(Partition { id: 5, count: 6 }),
            "also after scaling down"
        );
        assert_eq!(
            known_partition(&service(8, now.roles), &store),
            Some(Partition { id: 1, count: 2 })
        );
        // An invalid record: the ID is not below the count.
        store.save(7, Partition { id: 6, count: 6 });
        assert_eq!(store.load(), None);
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn numbers_from_max_ids_on_are_ignored() {
        let largest = MAX_IDS - 1;
        let numbered = |number| role(&[(101, number, None)]);
        assert_eq!(vm_number(&numbered(largest), &numbered(largest).vms[0]), Some(largest));
        assert_eq!(vm_number(&numbered(MAX_IDS), &numbered(MAX_IDS).vms[0]), None);
        let with_id = |id| role(&[(101, 0, Some(id))]);
        assert_eq!(published_id(&with_id(largest).vms[0]), Some(largest));
        assert_eq!(published_id(&with_id(MAX_IDS).vms[0]), None);
    }

    #[test]
    fn node_keeps_its_published_id() {
        let now = role(&[(102, 5, Some(1)), (103, 6, None)]);
        assert_eq!(choose_partition(&now, 102), Partition { id: 1, count: 2 });
        assert_eq!(choose_partition(&now, 103), Partition { id: 0, count: 2 });
    }
}
