//! One rank: its driver, its device, its groups.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use smddp::bootstrap::tcp_store::{Identity, Listen, TcpStore};
use smddp::cuda::{DeviceOptions, Memory, Wanted};
use smddp::{Communicator, DeviceGroup, GroupOptions, Result, Settings, Store, connect, library_dirs};
use smddp_cuda_sys::{Context, Driver, SUCCESS, Stream};
use smddp_standin::{Children, Control, Rank};

pub const LIMIT: Duration = Duration::from_secs(60);

/// Starts the calling test once for each rank.
pub fn children(test: &str, nodes: &[usize], more: &[(&str, &str)]) -> Children {
    let start = Children::of(test).ranks(nodes.iter().sum()).env("SMDDP_STANDIN_HANG_S", "40");
    more.iter().fold(start, |children, (name, value)| children.env(name, value))
}

pub struct Job {
    rank: usize,
    nodes: Vec<usize>,
    /// Node of this rank, and number in it.
    place: (usize, usize),
    store: Arc<dyn Store>,
    pub driver: Arc<Driver>,
    pub control: Control,
    device: i32,
    context: Context,
    pub stream: Stream,
}

#[derive(Default)]
#[repr(align(4096))]
struct Page(AtomicU32);

/// What a stream waits for.
pub struct Hold {
    page: &'static Page,
}

impl Hold {
    pub fn release(self) {
        self.page.0.store(1, Ordering::Release);
    }
}

pub struct Group {
    pub host: Communicator,
    pub device: DeviceGroup,
}

impl Group {
    pub fn end(self) {
        self.device.shutdown();
        self.host.shutdown();
    }
}

impl Job {
    /// On the device of the rank's number in its node.
    pub fn start(rank: &Rank, nodes: &[usize]) -> Job {
        let local = place(nodes, rank.rank).1;
        Job::start_on(rank, nodes, local as i32)
    }

    /// As `start` for calls that go as `wanted`, a value of SMDDP_CUDA: by NCCL alone all nodes, which one machine plays, meet,
    /// and NCCL wants a device for each rank.
    pub fn wanting(wanted: &str, rank: &Rank, nodes: &[usize]) -> Job {
        if wanted == "nccl" { Job::start_on(rank, nodes, rank.rank as i32) } else { Job::start(rank, nodes) }
    }

    /// As `start`, on nodes of equally many ranks that are dealt out in turn.
    pub fn interleaved(rank: &Rank, nodes: &[usize]) -> Job {
        let place = (rank.rank % nodes.len(), rank.rank / nodes.len());
        Job { place, ..Job::start_on(rank, nodes, place.1 as i32) }
    }

    pub fn start_on(rank: &Rank, nodes: &[usize], device: i32) -> Job {
        let paths = smddp_standin::paths();
        smddp::cuda::use_driver(paths.cuda.as_os_str()).unwrap();
        let control = Control::of(&paths.cuda).unwrap();
        let driver = Arc::new(Driver::load_file(paths.cuda.as_os_str()).unwrap());
        let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: places for what is made, as the driver wants them.
        unsafe {
            assert_eq!((driver.primary_retain)(&raw mut context, device), SUCCESS);
            assert_eq!((driver.ctx_set)(context), SUCCESS);
            assert_eq!((driver.stream_create)(&raw mut stream, 1, 0), SUCCESS);
        }
        let store = store(rank);
        let place = place(nodes, rank.rank);
        Job { rank: rank.rank, nodes: nodes.to_vec(), place, store, driver, control, device, context, stream }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn size(&self) -> usize {
        self.nodes.iter().sum()
    }

    /// The stream calls run on.
    pub fn stream_address(&self) -> u64 {
        self.stream.addr() as u64
    }

    /// Another stream of the rank's device.
    pub fn new_stream(&self) -> Stream {
        let mut stream = std::ptr::null_mut();
        // SAFETY: a place for the stream.
        assert_eq!(unsafe { (self.driver.stream_create)(&raw mut stream, 1, 0) }, SUCCESS);
        stream
    }

    pub fn end_stream(&self, stream: Stream) {
        // SAFETY: made by `new_stream`, used no more.
        assert_eq!(unsafe { (self.driver.stream_destroy)(stream) }, SUCCESS);
    }

    /// What is begun on that stream meanwhile is captured into a graph, and not run.
    pub fn capture<T>(&self, stream: Stream, during: impl FnOnce() -> T) -> T {
        self.control.capture(stream.addr(), true).unwrap();
        let result = during();
        self.control.capture(stream.addr(), false).unwrap();
        result
    }

    /// The rank's stream waits here until it is released.
    pub fn hold(&self) -> Hold {
        let page: &'static Page = Box::leak(Box::default());
        let (word, mut address) = (std::ptr::from_ref(page).cast_mut().cast(), 0);
        // SAFETY: a page that is never freed, and a place for its address.
        unsafe {
            assert_eq!((self.driver.host_register)(word, size_of::<Page>(), 3), SUCCESS);
            assert_eq!((self.driver.host_device_pointer)(&raw mut address, word, 0), SUCCESS);
            assert_eq!((self.driver.stream_wait_value)(self.stream, address, 1, 0), SUCCESS);
        }
        Hold { page }
    }

    /// The device's context, to be entered by other threads.
    pub fn context(&self) -> usize {
        self.context.addr()
    }

    pub fn group(&self, name: &str, settings: &[(&str, &str)]) -> Group {
        self.try_group(name, settings).unwrap()
    }

    fn settings(&self, more: &[(&str, &str)]) -> Settings {
        let mut settings = Settings::from_vars([]).unwrap();
        settings.set("SMDDP_NODE_ID", &format!("node{}", self.place.0)).unwrap();
        settings.set("SMDDP_NCCL", smddp_standin::paths().nccl.to_str().unwrap()).unwrap();
        for (name, value) in more {
            settings.set(name, value).unwrap();
        }
        settings
    }

    fn meet(
        &self,
        scope: String,
        (rank, size): (usize, usize),
        settings: &Settings,
        timeout: Duration,
    ) -> Result<Communicator> {
        connect(GroupOptions {
            // The device's communicator goes by its group's name.
            name: scope.trim_end_matches("/device").to_owned(),
            scope,
            rank,
            size,
            store: Arc::clone(&self.store),
            timeout,
            settings: settings.clone(),
            library_dirs: library_dirs(&[]),
        })
    }

    /// A group for the CPU alone.
    pub fn host(&self, name: &str, more: &[(&str, &str)]) -> Communicator {
        self.meet(name.to_owned(), (self.rank, self.size()), &self.settings(more), LIMIT).unwrap()
    }

    pub fn try_group(&self, name: &str, more: &[(&str, &str)]) -> Result<Group> {
        self.group_within(name, more, LIMIT)
    }

    /// A group with a time limit of its own.
    pub fn group_within(&self, name: &str, more: &[(&str, &str)], limit: Duration) -> Result<Group> {
        let (node, local) = self.place;
        let settings = self.settings(more);
        let host = self.meet(name.to_owned(), (self.rank, self.size()), &settings, limit)?;
        let wanted = Wanted::of(host.shape(), self.rank, &settings);
        let part = |label: String, place| self.meet(format!("{name}/{label}"), place, &settings, limit);
        let own = wanted.own.then(|| part("device".to_owned(), (self.rank, self.size())));
        let rail = wanted.rail.map(|ranks| part(format!("rail{local}"), (node, ranks.len())));
        let (own, rail) = (own.transpose()?, rail.transpose()?);
        let device = self.device_side(own.as_ref().unwrap_or(&host), rail, settings)?;
        Ok(Group { host, device })
    }

    /// The CUDA side of a group on one node.
    pub fn try_side(&self, host: &Communicator) -> Result<DeviceGroup> {
        self.device_side(host, None, self.settings(&[]))
    }

    fn device_side(
        &self,
        host: &Communicator,
        rail: Option<Communicator>,
        settings: Settings,
    ) -> Result<DeviceGroup> {
        let (host, device, library_dirs) = (host.clone(), self.device, Vec::new());
        DeviceGroup::new(DeviceOptions { host, rail, device, settings, library_dirs })
    }

    /// Waits until the device has done what this rank's stream was given.
    pub fn synchronize(&self) {
        self.synchronize_stream(self.stream);
    }

    pub fn synchronize_stream(&self, stream: Stream) {
        // SAFETY: a stream of ours.
        assert_eq!(unsafe { (self.driver.stream_synchronize)(stream) }, SUCCESS);
    }

    /// Whether the stream is idle within the limit; a test that fails says so instead of hanging.
    pub fn comes_to_rest(&self) -> bool {
        let until = Instant::now() + Duration::from_secs(20);
        // SAFETY: our stream.
        while unsafe { (self.driver.stream_query)(self.stream) } != SUCCESS {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// Whether a stream waits for something within the limit.
    pub fn comes_to_wait(&self) -> bool {
        let until = Instant::now() + Duration::from_secs(20);
        while self.control.parked() == 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.control.parked() > 0
    }

    /// Device memory with these bytes in it once the stream comes there.
    pub fn memory(&self, bytes: &[u8]) -> Memory {
        let address = allocate(&self.driver, bytes.len().max(1));
        // SAFETY: a copy from pageable memory has read it when the call returns.
        let status =
            unsafe { (self.driver.copy_to_device)(address, bytes.as_ptr().cast(), bytes.len(), self.stream) };
        assert!(status == SUCCESS || bytes.is_empty());
        Memory { address, bytes: bytes.len() }
    }

    /// Writes memory once the rank's stream comes there.
    pub fn write(&self, memory: Memory, bytes: &[u8]) {
        assert_eq!(bytes.len(), memory.bytes);
        // SAFETY: a copy from pageable memory has read it when the call returns.
        let status = unsafe {
            (self.driver.copy_to_device)(memory.address, bytes.as_ptr().cast(), bytes.len(), self.stream)
        };
        assert_eq!(status, SUCCESS);
    }

    /// What device memory holds when the stream is past all it was given.
    pub fn read(&self, memory: Memory) -> Vec<u8> {
        let mut bytes = vec![0u8; memory.bytes];
        if memory.bytes > 0 {
            // SAFETY: room for the copy, which is over when the stream is.
            let status = unsafe {
                (self.driver.copy_to_host)(
                    bytes.as_mut_ptr().cast(),
                    memory.address,
                    bytes.len(),
                    self.stream,
                )
            };
            assert_eq!(status, SUCCESS);
            self.synchronize();
        }
        bytes
    }

    pub fn free(&self, memory: Memory) {
        free(&self.driver, memory.address);
    }

    /// Nothing of the device's is left behind.
    pub fn end(self) {
        // SAFETY: our stream, used no more.
        assert_eq!(unsafe { (self.driver.stream_destroy)(self.stream) }, SUCCESS);
        let left = self.control.leaks();
        assert_eq!(left, smddp_standin::abi::Leaks::default(), "left behind");
        assert_eq!(self.control.lasting_error(), None);
    }
}

/// Node, and number in it, of a rank.
pub fn place(nodes: &[usize], rank: usize) -> (usize, usize) {
    let mut first = 0;
    for (node, &ranks) in nodes.iter().enumerate() {
        if rank < first + ranks {
            return (node, rank - first);
        }
        first += ranks;
    }
    panic!("no rank {rank} on {nodes:?}")
}

fn store(rank: &Rank) -> Arc<dyn Store> {
    let me = Identity { rank: rank.rank, size: rank.ranks, secret: [7; 16] };
    let until = Instant::now() + LIMIT;
    if rank.rank == 0 {
        let listen = Listen { loopback: true, ports: vec![0] };
        let store = TcpStore::host(me, &listen, until).unwrap();
        rank.publish("store", store.port().unwrap().to_string().as_bytes());
        return Arc::new(store);
    }
    let port = String::from_utf8(rank.receive("store")).unwrap();
    Arc::new(TcpStore::connect(me, &[format!("127.0.0.1:{port}")], until).unwrap())
}

pub fn enter(driver: &Driver, context: usize) {
    // SAFETY: a context that is held until the process ends.
    assert_eq!(unsafe { (driver.ctx_set)(std::ptr::without_provenance_mut(context)) }, SUCCESS);
}

pub fn allocate(driver: &Driver, bytes: usize) -> u64 {
    let mut address = 0;
    // SAFETY: a place for the address.
    assert_eq!(unsafe { (driver.memory_allocate)(&raw mut address, bytes) }, SUCCESS);
    address
}

pub fn free(driver: &Driver, address: u64) {
    // SAFETY: allocated by `allocate`, used no more.
    assert_eq!(unsafe { (driver.memory_free)(address) }, SUCCESS);
}
