//! A page of zeros costs a page, also where the kernel makes transparent huge pages of what it fills in.

use std::num::NonZeroU32;

use pagecast::server::ForkState;
use pagecast_testkit::PageSize;
use pagecast_testkit::process::MemoryUse;
use pagecast_testkit::sim_vmm::{Connect, Pages, Read, SimVmm, Write};
use pagecast_testkit::template_file::{Layout, TemplateFile, TemplateModel};
use pagecast_testkit::transparent::TransparentHugePages;

use crate::fixture::{Fixture, PATIENCE, assert_reads_right, eventually, given_back, read_range};

/// Pages of 4 KiB that are zeros in the template: several blocks of 2 MiB, wherever the VMM's memory begins.
const ZEROS: std::ops::Range<u64> = 1024..3584;

fn fixture() -> Fixture {
    let file = TemplateFile::create(TemplateModel {
        size: 16 << 20,
        seed: 5,
        layout: Layout {
            zero_every: None,
            holes: vec![ZEROS],
        },
    })
    .unwrap();
    Fixture {
        template: pagecast::Template::open(file.path()).unwrap(),
        file,
        ..Fixture::new()
    }
}

fn transparent(connect: Connect) -> Connect {
    Connect {
        page_size: PageSize::Transparent,
        ..connect
    }
}

fn write(vmm: &SimVmm, page: u64) {
    vmm.run(Write {
        pages: Pages::range(page..page + 1),
        generation: NonZeroU32::MIN,
        threads: 1,
    })
    .unwrap();
}

/// Writes some of the zeros, far from each other: this costs a few pages.
fn assert_zeros_cost_pages(vmm: &SimVmm, pages: [u64; 2]) {
    let used = || MemoryUse::of(vmm.pid()).unwrap().rss_bytes;
    // What the VMM itself needs for this.
    write(vmm, 0);
    let before = used();
    for page in pages {
        write(vmm, page);
    }
    let cost = used().saturating_sub(before);
    assert!(cost < 1 << 20, "{cost} bytes for {} pages", pages.len());
}

/// A fork whose zeros are written while it is served, and after it was completed.
fn zeros_cost_pages(setting: &str, change: impl FnOnce(Connect) -> Connect) {
    let Some(_set) = TransparentHugePages::set(setting).unwrap() else {
        return;
    };
    let fixture = fixture();
    let (fork, vmm) = fixture.fork_with("a", change);
    // What is done before the first fault is answered is done.
    assert_reads_right(&vmm, read_range(0, 1));
    assert_zeros_cost_pages(&vmm, [1600, 2200]);
    fork.complete().unwrap();
    let status = fork.wait(PATIENCE, ForkState::is_end);
    assert_eq!(status.state, ForkState::Complete, "{status:?}");
    assert_zeros_cost_pages(&vmm, [1700, 3000]);
    assert_reads_right(
        &vmm,
        Read {
            pages: Pages::range(ZEROS),
            ..Read::default()
        },
    );
}

#[test]
fn a_page_of_zeros_costs_a_page_where_huge_pages_are_always_made() {
    zeros_cost_pages("always", |connect| connect);
}

#[test]
fn a_page_of_zeros_costs_a_page_where_the_vmm_asks_for_huge_pages() {
    zeros_cost_pages("madvise", transparent);
}

#[test]
fn zeros_are_left_to_the_kernel_where_the_vmm_does_not_ask_for_huge_pages() {
    let Some(_set) = TransparentHugePages::set("madvise").unwrap() else {
        return;
    };
    let fixture = fixture();
    let (fork, vmm) = fixture.fork("a");
    eventually("zeros are given back", || {
        given_back(&fork.status()) == ZEROS.end - ZEROS.start
    });
    assert_zeros_cost_pages(&vmm, [1600, 2200]);
}
