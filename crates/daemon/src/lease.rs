//! stub
use std::sync::Arc;
use pagecast::template::MemFile;
#[derive(Debug)]
pub struct Lease;
#[derive(Debug, thiserror::Error)]
#[error("x")]
pub enum LeaseError { OpenForWriting, Other }
pub struct LeaseWatch;
impl LeaseWatch {
    pub fn start() -> std::io::Result<Self> { Ok(Self) }
    pub fn lease(&self, _: &Arc<MemFile>, _: impl Fn() + Send + 'static) -> Result<Lease, LeaseError> { Err(LeaseError::Other) }
}
