//! The message of a VMM.

use pagecast::PageSize;
use pagecast::handshake::{Framer, Layout, MAX_REGIONS, RequestedRegion, parse};
use pagecast_uffd::{ByteLen, HostAddr};
use serde_json::{Value, json};

/// The length of the template, in bytes.
const TEMPLATE: u64 = 1 << 30;

/// The first four bytes choose the sizes of the pieces.
pub(crate) fn run(bytes: &[u8]) {
    let Some((seed, message)) = bytes.split_first_chunk() else {
        return;
    };
    let complete = frame(message, u32::from_le_bytes(*seed));
    let value: Option<Value> = serde_json::from_slice(message).ok();
    if value.is_some_and(|value| value.is_array() || value.is_object()) {
        assert!(complete, "a JSON array or object is not framed");
    }
    let Ok(requested) = parse(message) else { return };
    assert!(complete, "a message that can be read is not framed");
    assert!(requested.len() <= MAX_REGIONS);
    assert_eq!(
        parse(&written(&requested)).expect("what was read is read again"),
        requested
    );
    lay_out(&requested);
}

/// Returns `true` if the message is complete, which must not depend on its pieces.
fn frame(message: &[u8], seed: u32) -> bool {
    let mut whole = Framer::default();
    let expected = whole.push(message);
    let mut pieces = Framer::default();
    let mut last = Ok(false);
    let (mut rest, mut random) = (message, seed);
    while !rest.is_empty() && last.is_ok() {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let (piece, after) = rest.split_at(rest.len().min((random >> 27) as usize));
        last = pieces.push(piece);
        rest = after;
    }
    assert_eq!(last, expected, "pieces matter");
    if last.is_ok() {
        assert_eq!(pieces.bytes(), message);
    }
    last == Ok(true)
}

fn written(regions: &[RequestedRegion]) -> Vec<u8> {
    let regions = regions.iter().map(|region| {
        json!({
            "base_host_virt_addr": region.base_host_virt_addr,
            "size": region.size,
            "offset": region.offset,
            "page_size": region.page_size,
        })
    });
    serde_json::to_vec(&regions.collect::<Vec<_>>()).expect("numbers can be written")
}

fn lay_out(requested: &[RequestedRegion]) {
    let layout = Layout::validate(requested, ByteLen::new(TEMPLATE));
    assert_eq!(layout.is_ok(), can_be_served(requested), "{layout:?}");
    let Ok(layout) = layout else { return };
    let regions = layout.into_regions();
    assert_eq!(regions.iter().count(), requested.len());
    for region in requested {
        let last = region.base_host_virt_addr + (region.size - 1);
        for addr in [region.base_host_virt_addr, last] {
            let (index, page) = regions.find(HostAddr::new(addr)).expect("each address is found");
            let found = regions.get(index).expect("an index that was found is there");
            assert_eq!(found.memory().start().get(), region.base_host_virt_addr);
            assert_eq!(found.memory().len().get(), region.size);
            assert_eq!(found.offset().get(), region.offset);
            assert_eq!(found.page_size().bytes(), region.page_size);
            assert!(page.get() < found.pages());
        }
    }
}

/// The rules of `docs/architecture.md`, implemented a second time, as simply as possible.
fn can_be_served(regions: &[RequestedRegion]) -> bool {
    let end = |start: u64, region: &RequestedRegion| u128::from(start) + u128::from(region.size);
    let overlap = |start: fn(&RequestedRegion) -> u64, one: &RequestedRegion, other: &RequestedRegion| {
        u128::from(start(one)) < end(start(other), other) && u128::from(start(other)) < end(start(one), one)
    };
    let sound = |region: &RequestedRegion| {
        let numbers = [region.base_host_virt_addr, region.size, region.offset];
        PageSize::from_bytes(region.page_size).is_some()
            && numbers.iter().all(|number| number % region.page_size == 0)
            && region.size > 0
            && end(region.base_host_virt_addr, region) <= u128::from(u64::MAX)
            && end(region.offset, region) <= u128::from(TEMPLATE)
    };
    let apart = regions.iter().enumerate().all(|(index, one)| {
        regions.iter().take(index).all(|other| {
            !overlap(|region| region.base_host_virt_addr, one, other) && !overlap(|region| region.offset, one, other)
        })
    });
    !regions.is_empty() && regions.iter().all(sound) && apart
}
