use std::os::fd::AsFd as _;

use pagecast::template::MemFile;
use pagecast_client::ForkState;
use pagecast_client::fork::BackendType;
use pagecast_client::template::Protection;
use pagecast_testkit::template_file::{TemplateFile, TemplateModel};

use super::*;
use crate::fork::{BackedBy, FileFork, mem_backend};
use crate::local_file::{LocalFile, Spec};
use crate::ownership::Ownership;
use crate::protection::Applied;
use crate::validity::Forks;

fn template(name: &str) -> Arc<Template> {
    let file = TemplateFile::create(TemplateModel::of_data(4096, 1)).unwrap();
    let spec = Spec {
        vmstate_path: None,
        page_size: 4096,
        page_size_is_guess: false,
    };
    let mem_file = Arc::new(MemFile::open(file.path()).unwrap());
    let ownership = Ownership::of(mem_file.as_fd()).unwrap();
    let protection = Applied::plan(mem_file.as_fd(), Protection::None).unwrap();
    let file = LocalFile::new(mem_file, Protection::None, ownership, protection, None, None);
    Arc::new(Template::of_file(name.parse().unwrap(), spec, Arc::new(file)))
}

/// Creates a fork with `file` that waits for its VMM.
fn fork(taken: &TakenId<'_>) -> Arc<Fork> {
    let file = taken.template.file.clone().unwrap();
    Arc::new(Fork {
        id: taken.id.clone(),
        template: Arc::clone(&taken.template),
        reason: String::new(),
        mem_backend: mem_backend(BackendType::File, file.path_for_forks()),
        backed_by: BackedBy::File(FileFork::new(Arc::clone(&file), None, None)),
    })
}

fn end(fork: &Fork) {
    assert!(fork.file().unwrap().end(ForkState::Exited));
}

/// Creates a registry with the template `t`.
fn registry() -> (Registry, Arc<Template>) {
    let registry = Registry::new(3, 1);
    let template = template("t");
    let Ok(Name::Free(name)) = registry.take_name(template.name.clone()) else {
        panic!("no template has it")
    };
    name.add(Arc::clone(&template));
    (registry, template)
}

fn add_fork(registry: &Registry, id: &str) -> Arc<Fork> {
    let taken = registry.take_id("t", Some(id.parse().unwrap())).unwrap();
    let fork = fork(&taken);
    taken.add(&fork).unwrap();
    fork
}

#[track_caller]
fn assert_refused<T>(result: Result<T, ApiError>, code: ErrorCode) {
    assert_eq!(result.err().map(|error| error.code), Some(code));
}

#[test]
fn the_name_of_a_template_is_taken_once_and_given_back() {
    let registry = Registry::new(1, 1);
    let name: TemplateName = "t".parse().unwrap();
    let taken = registry.take_name(name.clone()).unwrap();
    assert_refused(registry.take_name(name.clone()), ErrorCode::TemplateExists);
    assert_refused(registry.template("t"), ErrorCode::TemplateNotFound);
    drop(taken);
    assert!(matches!(registry.take_name(name), Ok(Name::Free(_))));
}

#[test]
fn the_name_of_a_removed_template_stays_taken_until_it_is_cleaned_up() {
    let (registry, template) = registry();
    let taken = registry.remove_template(&template).unwrap();
    assert_refused(registry.template("t"), ErrorCode::TemplateNotFound);
    assert_refused(registry.take_name(template.name.clone()), ErrorCode::TemplateExists);
    drop(taken);
    assert!(matches!(registry.take_name(template.name.clone()), Ok(Name::Free(_))));
}

#[test]
fn a_template_is_removed_and_not_another_of_its_name() {
    let (registry, first) = registry();
    drop(registry.remove_template(&first).unwrap());
    let second = template("t");
    registry.restore_template(Arc::clone(&second));
    assert_refused(registry.remove_template(&first), ErrorCode::TemplateNotFound);
    assert!(Arc::ptr_eq(&registry.template("t").unwrap(), &second));
}

#[test]
fn a_template_is_kept_for_forks_that_are_made_or_live() {
    let (registry, template) = registry();
    let making = registry.take_id("t", None).unwrap();
    assert_refused(registry.remove_template(&template), ErrorCode::TemplateInUse);
    drop(making);
    let fork = add_fork(&registry, "f");
    assert_refused(registry.remove_template(&template), ErrorCode::TemplateInUse);
    end(&fork);
    registry.remove_template(&template).unwrap();
}

#[test]
fn an_id_is_taken_once_and_given_back() {
    let (registry, _) = registry();
    let id: ForkId = "f".parse().unwrap();
    let making = registry.take_id("t", Some(id.clone())).unwrap();
    assert_refused(registry.take_id("t", Some(id.clone())), ErrorCode::ForkExists);
    assert_refused(registry.fork("f"), ErrorCode::ForkNotFound);
    assert!(registry.forks().is_empty());
    drop(making);
    registry.take_id("t", Some(id)).unwrap();
}

#[test]
fn an_id_that_is_made_up_is_new() {
    let (registry, _) = registry();
    add_fork(&registry, "fork-2");
    let first = registry.take_id("t", None).unwrap();
    assert_eq!(first.id.as_str(), "fork-1");
    drop(first);
    assert_eq!(registry.take_id("t", None).unwrap().id.as_str(), "fork-3");
}

#[test]
fn forks_that_have_ended_leave_room_for_others() {
    let (registry, _) = registry();
    let first = add_fork(&registry, "a");
    add_fork(&registry, "b");
    let _making = registry.take_id("t", None).unwrap();
    assert_refused(registry.take_id("t", None), ErrorCode::TooManyForks);
    end(&first);
    assert!(registry.note_end(&first).unwrap().is_empty());
    registry.take_id("t", None).unwrap();
}

#[test]
fn the_fork_that_ended_first_is_forgotten_and_its_numbers_are_kept() {
    let (registry, template) = registry();
    let (first, second) = (add_fork(&registry, "a"), add_fork(&registry, "b"));
    end(&first);
    end(&second);
    assert!(registry.note_end(&first).unwrap().is_empty());
    assert!(registry.note_end(&first).is_none(), "it is noted");
    let forgotten = registry.note_end(&second).unwrap();
    assert!(forgotten.len() == 1 && Arc::ptr_eq(&forgotten[0], &first));
    let snapshot = registry.snapshot();
    assert_eq!(snapshot.forks.len(), 1);
    let created = |snapshot: &Snapshot| {
        snapshot
            .totals
            .iter()
            .map(|(_, of)| of.created(Backend::File))
            .sum::<u64>()
    };
    assert_eq!(created(&snapshot), 1);
    // Once a template and all its forks are removed, its counters are too.
    drop(registry.remove_template(&template).unwrap());
    assert_eq!(registry.remove_fork(&second), Some(true));
    assert_eq!(created(&registry.snapshot()), 0);
}

#[test]
fn a_late_call_leaves_another_fork_of_the_same_id_alone() {
    let (registry, _) = registry();
    let first = add_fork(&registry, "f");
    assert_eq!(registry.unless_replaced(&first, || ()), Some(()));
    assert_eq!(registry.remove_fork(&first), Some(false));
    assert_eq!(registry.unless_replaced(&first, || ()), Some(()));
    let second = add_fork(&registry, "f");
    end(&first);
    assert!(registry.note_end(&first).is_none());
    assert_eq!(registry.remove_fork(&first), None);
    assert_eq!(registry.unless_replaced(&first, || ()), None);
    assert!(Arc::ptr_eq(&registry.fork("f").unwrap(), &second));
}

#[test]
fn a_fork_is_refused_if_its_template_has_changed_meanwhile() {
    let (registry, template) = registry();
    let taken = registry.take_id("t", Some("f".parse().unwrap())).unwrap();
    let fork = fork(&taken);
    template.validity.invalidate("it was written", Forks::Left);
    assert_eq!(&*taken.add(&fork).unwrap_err(), "it was written");
    assert_refused(registry.fork("f"), ErrorCode::ForkNotFound);
    registry.remove_template(&template).unwrap();
}
