//! The device on stand-ins for the drivers (`tests/fake_driver`): what it asks of the driver, in which order, and what it says when
//! the driver refuses.

mod hip;

use super::*;
use crate::testing::{header, part, write_artifact, write_checkpoint, write_tensors};
use crate::{Checkpoint, DeviceError, GenerateOptions, Model, Options, WeightsFrom};
use dsc_ir::DType;
use dsc_ir::artifact::{GpuKernel, Resources, TensorMap, WeightEntry, WeightSource};
use dsc_ir::graph::{Elem, Quant};
use libloading::Library;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

/// Numbers of the driver's settings.
const VERSION: usize = 0;
const DEVICES: usize = 1;
const MAJOR: usize = 2;
const MEMORY: usize = 4;
const FAULT: usize = 5;

/// A driver of its own for one test.
struct Fake {
    vendor: Vendor,
    library: Library,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

/// A vendor's driver as rustc made it: built once, and copied for each test, since a library at another path has its own state.
fn built(vendor: Vendor) -> &'static [u8] {
    static BUILT: [OnceLock<Vec<u8>>; 2] = [OnceLock::new(), OnceLock::new()];
    let name = ["cuda", "hip"][vendor as usize];
    BUILT[vendor as usize].get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let source = format!("{}/tests/fake_driver/{name}.rs", env!("CARGO_MANIFEST_DIR"));
        let out = dir.path().join(name);
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let mut command = Command::new(rustc);
        command.args(["--edition", "2024", "--crate-type", "cdylib", "--crate-name", name, &source, "-o"]).arg(&out);
        let built = command.output().unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        std::fs::read(out).unwrap()
    })
}

impl Fake {
    fn new(settings: &[(usize, u64)]) -> Fake {
        Fake::of(Vendor::Nvidia, settings)
    }

    fn of(vendor: Vendor, settings: &[(usize, u64)]) -> Fake {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(Spec::of(vendor).library);
        std::fs::write(&path, built(vendor)).unwrap();
        // SAFETY: the library does nothing when it is loaded.
        let library = unsafe { Library::new(&path) }.unwrap();
        let fake = Fake { vendor, library, path, _dir: dir };
        settings.iter().for_each(|&(which, value)| fake.set(which, value));
        fake
    }

    fn set(&self, which: usize, value: u64) {
        // SAFETY: the symbol has this type.
        let set = unsafe { self.library.get::<extern "C" fn(usize, u64)>("fake_set") }.unwrap();
        set(which, value);
    }

    /// The calls since the last time.
    fn log(&self) -> Vec<String> {
        let mut text = vec![0u8; 1 << 20];
        // SAFETY: the symbol has this type.
        let log = unsafe { self.library.get::<unsafe extern "C" fn(*mut u8, usize) -> usize>("fake_log") }.unwrap();
        // SAFETY: the buffer has as many bytes as it is told.
        let count = unsafe { log(text.as_mut_ptr(), text.len()) };
        String::from_utf8_lossy(&text[..count]).lines().map(str::to_owned).collect()
    }

    /// Bytes of device memory in use.
    fn used(&self) -> u64 {
        // SAFETY: the symbol has this type.
        let used = unsafe { self.library.get::<extern "C" fn() -> u64>("fake_used") }.unwrap();
        used()
    }

    fn device(&self) -> Result<GpuDevice, DeviceError> {
        GpuDevice::open_with(self.vendor, &self.path, 0, 2)
    }

    /// The error of opening the device and loading code for a target.
    fn refusal(&self, header: &Header, code: Code<'_>) -> String {
        self.device().and_then(|mut device| device.load_code(header, code)).unwrap_err().to_string()
    }
}

/// A header with kernel `count`, its machine code (`CUBN` and its name), and its assembly.
fn gpu_header() -> (Header, Vec<u8>, Vec<u8>) {
    let (native, portable) = (b"CUBNcount\0".to_vec(), b".visible .entry count(\n)".to_vec());
    let mut header = header();
    header.target = "sm_90a".into();
    header.kernels[0].code_bytes = native.len() as u64;
    header.kernels[0].gpu = Some(GpuKernel {
        threads: 128,
        shared_bytes: 65536,
        cluster: 1,
        persistent: false,
        team: 1,
        apart: false,
        turns: 0,
        ranges: false,
        maps: Vec::new(),
        dependent: false,
        scratch_bytes: 0,
        asm: [0, portable.len() as u64],
        resources: Some(Resources::default()),
    });
    (header, native, portable)
}

fn loaded(fake: &Fake, edit: impl FnOnce(&mut Header)) -> GpuDevice {
    let (mut header, native, portable) = gpu_header();
    edit(&mut header);
    let mut device = fake.device().unwrap();
    device.load_code(&header, Code { native: &native, portable: &portable }).unwrap();
    device
}

fn counts(device: &mut GpuDevice, buffer: Buffer, cells: usize) -> Vec<u32> {
    let mut bytes = vec![0; 4 * cells];
    device.read(buffer, 0, &mut bytes).unwrap();
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn launches(buffer: Buffer, places: &[u64]) -> Vec<BoundLaunch> {
    let launch = |&at: &u64| BoundLaunch { kernel: 0, node: "count".into(), args: vec![(buffer, at)] };
    places.iter().map(launch).collect()
}

#[test]
fn a_machine_without_driver_or_gpu_is_told_what_to_do() {
    let error =
        GpuDevice::open_with(Vendor::Nvidia, Path::new("/nowhere/libcuda.so.1"), 0, 1).err().unwrap().to_string();
    assert!(error.contains("no CUDA driver") && error.contains("/nowhere/libcuda.so.1"), "{error}");
    assert!(error.contains("; use a machine with the NVIDIA driver"), "{error}");
    let refusal = |settings, ordinal| {
        let fake = Fake::new(settings);
        GpuDevice::open_with(fake.vendor, &fake.path, ordinal, 1).err().unwrap().to_string()
    };
    assert!(refusal(&[(DEVICES, 0)], 0).contains("the driver sees 0; use a machine with one"));
    assert!(refusal(&[(DEVICES, 2)], 2).contains("there is no GPU 2, the driver sees 2; give another number"));
    let old = refusal(&[(VERSION, 11080)], 0);
    assert!(old.contains("serves CUDA 11.8, and CUDA 12 is needed; update"), "{old}");
}

#[test]
fn code_for_another_gpu_is_refused() {
    let (mut header, native, portable) = gpu_header();
    let code = Code { native: &native, portable: &portable };
    let ampere = Fake::new(&[(MAJOR, 8)]);
    let error = ampere.refusal(&header, code);
    assert!(
        error.contains("for sm_90a, which GPU 0 (Fake H200), of compute capability 8.0, does not run; compile"),
        "{error}"
    );
    // Of an older architecture the driver compiles the assembly; there is machine code only for the old one.
    header.target = "sm_80".into();
    let hopper = Fake::new(&[]);
    let mut device = hopper.device().unwrap();
    device.load_code(&header, code).unwrap();
    assert!(device.load_code(&header, code).unwrap_err().to_string().contains("loaded twice"));
    assert_eq!(hopper.log(), ["load count", "attribute 8 = 65536"]);
    let error = hopper.refusal(&header, Code::native(&native));
    assert!(error.contains("outside the code"), "{error}");
    header.kernels[0].gpu.as_mut().unwrap().asm = [0, 0];
    assert!(hopper.refusal(&header, Code::native(&native)).contains("for sm_80, which GPU 0"));
    header.target = "cpu".into();
    assert!(hopper.refusal(&header, code).contains("target cpu"));
    header.target = "sm_90a".into();
    header.kernels[0].gpu.as_mut().unwrap().shared_bytes = 300_000;
    assert!(hopper.refusal(&header, code).contains("300000 bytes of shared memory a block (it has 232448)"));
}

#[test]
fn assembly_that_the_driver_refuses_is_shown() {
    let (mut header, _, _) = gpu_header();
    let portable = b".entry broken()".to_vec();
    header.kernels[0].code_bytes = 0;
    let gpu = header.kernels[0].gpu.as_mut().unwrap();
    (gpu.resources, gpu.asm) = (None, [0, portable.len() as u64]);
    let error = Fake::new(&[]).refusal(&header, Code { native: &[], portable: &portable });
    assert!(error.contains("refuses the assembly of kernel count: line 3: what is this; update"), "{error}");
}

#[test]
fn kernels_of_a_library_take_symbols_by_value_and_make_nothing() {
    let fake = Fake::new(&[]);
    let (mut header, _, _) = gpu_header();
    let (native, portable) = (b"CUBNtally\0".to_vec(), b".visible .entry tally(\n)".to_vec());
    header.kernels[0].name = "tally".into();
    header.kernels[0].code_bytes = native.len() as u64;
    let gpu = header.kernels[0].gpu.as_mut().unwrap();
    (gpu.asm, gpu.shared_bytes) = ([0, portable.len() as u64], 0);
    let code = Code { native: &native, portable: &portable };
    let refused = GpuFunctions::open_with((&cuda::SPEC, &fake.path), 0, &header, code).err().unwrap().to_string();
    assert!(refused.contains("kernel tally takes symbols from device memory"), "{refused}");
    header.kernels[0].schedule.symbols_by_value = true;
    let mut device = fake.device().unwrap();
    device.load_code(&header, code).unwrap();
    let buffer = device.alloc(4 * 8, "test").unwrap();
    let error = device.bind(&launches(buffer, &[0]), &SymValues([3, 1, 1, 1, 1, 1])).unwrap_err().to_string();
    assert!(error.contains("tally takes symbols by value"), "{error}");

    let functions = GpuFunctions::open_with((&cuda::SPEC, &fake.path), 0, &header, code).unwrap();
    let (place, used) = (device.place(buffer).unwrap().0, fake.used());
    fake.log();
    for tokens in [3, 1, 5] {
        // SAFETY: eight cells are there; the fake driver has no streams.
        unsafe { functions.launch(std::ptr::null_mut(), 0, vec![place + 4], &SymValues([tokens, 1, 1, 1, 1, 1])) }
            .unwrap();
    }
    let launch = |n| format!("launch tally {n}x1x1 of 128, 0 bytes, cluster 1");
    assert_eq!(fake.log(), [launch(3), launch(1), launch(5)]);
    assert_eq!(fake.used(), used);
    assert_eq!(counts(&mut device, buffer, 8), [0, 3, 2, 2, 1, 1, 0, 0]);
}

#[test]
fn same_code_is_loaded_once() {
    let fake = Fake::new(&[]);
    let device = loaded(&fake, |header| {
        let mut twin = header.kernels[0].clone();
        twin.name = "count_again".into();
        twin.gpu.as_mut().unwrap().shared_bytes = 100;
        header.kernels.push(twin);
    });
    assert_eq!(fake.log(), ["load count", "attribute 8 = 65536", "attribute 8 = 65536"]);
    drop(device);
    assert_eq!(fake.log(), ["wait", "unload", "release"]);
    assert_eq!(fake.used(), 0);
}

#[test]
fn steps_run_one_by_one_then_as_a_graph() {
    let fake = Fake::new(&[]);
    let mut device = loaded(&fake, |_| ());
    let buffer = device.alloc(4 * 1000, "test").unwrap();
    let limits = SymValues([996, 1, 1, 1, 1, 1]);
    let bound = device.bind(&launches(buffer, &[0, 0, 4]), &limits).unwrap();
    fake.log();
    let line = |blocks| format!("launch count {blocks}x1x1 of 128, 65536 bytes, cluster 1");
    device.run(bound, 0..3, &limits.with(Sym::T, 100), None).unwrap();
    assert_eq!(fake.log(), ["to device 24".to_owned(), line(100), line(100), line(100)]);
    // 97 tokens share the grid of 112 blocks with 100; blocks without a token do nothing.
    device.run(bound, 0..3, &limits.with(Sym::T, 97), None).unwrap();
    assert_eq!(
        fake.log(),
        ["to device 24".to_owned(), "capture".into(), "graph of 3".into(), line(112), line(112), line(112)]
    );
    device.run(bound, 0..3, &limits.with(Sym::T, 97), None).unwrap();
    assert_eq!(fake.log().len(), 4, "the symbols are there already");
    let found = counts(&mut device, buffer, 102);
    assert_eq!(fake.log(), ["to host 408", "wait"], "a step waits once");
    for (cell, count) in found.iter().enumerate() {
        let runs = |end: usize| if cell < end { 1 } else { 0 };
        let (first, shifted) = (runs(100) + 2 * runs(97), u32::from(cell > 0) * (runs(101) + 2 * runs(98)));
        assert_eq!(*count, 2 * first + shifted, "cell {cell}");
    }
    // Few launches are not worth a graph; a launch without blocks is none.
    device.run(bound, 1..3, &limits.with(Sym::T, 97), None).unwrap();
    device.run(bound, 1..3, &limits.with(Sym::T, 0), None).unwrap();
    assert_eq!(fake.log(), [line(97), line(97), "to device 24".into()]);
    drop(device);
    assert_eq!(fake.log(), ["wait", "destroy graph", "unload", "release"]);
}

#[test]
fn launches_are_timed() {
    let fake = Fake::new(&[]);
    let mut device = loaded(&fake, |_| ());
    let buffer = device.alloc(4000, "test").unwrap();
    let syms = SymValues([10, 1, 1, 1, 1, 1]);
    let bound = device.bind(&launches(buffer, &[0, 0]), &syms).unwrap();
    let mut times = LaunchTimes::default();
    device.run(bound, 1..2, &syms, Some(&mut times)).unwrap();
    assert_eq!((times.launches[1].runs, times.launches[1].blocks), (1, 10));
    assert_eq!(times.launches[1].total, Duration::from_millis(2));
    // 2 ms for 3 graphs of 4096 runs, the least number of equal ones.
    assert_eq!(device.time(bound, 0..1, &syms, 12_000).unwrap(), Duration::from_secs_f64(2e-3 / 12_288.0));
    assert_eq!(device.limits(0).unwrap().bytes_per_s, 4.8e12);
}

#[test]
fn many_shapes_keep_few_graphs() {
    let fake = Fake::new(&[]);
    let mut device = loaded(&fake, |_| ());
    let buffer = device.alloc(4000, "test").unwrap();
    let limits = SymValues([1000, 1, 1, 1, 1, 1]);
    let bound = device.bind(&launches(buffer, &[0, 0, 0]), &limits).unwrap();
    let graphs = |lines: Vec<String>, what: &str| lines.iter().filter(|l| l.starts_with(what)).count();
    for tokens in 1..=64 {
        for _ in 0..2 {
            device.run(bound, 0..3, &limits.with(Sym::T, tokens), None).unwrap();
        }
    }
    assert_eq!(graphs(fake.log(), "capture"), 64);
    device.run(bound, 0..3, &limits.with(Sym::T, 1), None).unwrap();
    device.run(bound, 0..3, &limits.with(Sym::T, 1000), None).unwrap();
    assert_eq!(graphs(fake.log(), "destroy"), 1);
    device.run(bound, 0..3, &limits.with(Sym::T, 1), None).unwrap();
    device.run(bound, 0..3, &limits.with(Sym::T, 2), None).unwrap();
    assert_eq!(graphs(fake.log(), "launch count 2x"), 3, "the oldest went, and comes one by one again");
}

#[test]
fn clusters_and_tensor_maps_reach_the_driver() {
    let fake = Fake::new(&[]);
    let mut device = loaded(&fake, |header| {
        let kernel = &mut header.kernels[0];
        kernel.params[0].view.shape.push(64.into());
        kernel.params[0].view.strides = dsc_ir::tile::ViewType::dense(DType::I32, &kernel.params[0].view.shape).strides;
        let gpu = kernel.gpu.as_mut().unwrap();
        gpu.cluster = 16;
        gpu.dependent = true;
        gpu.maps = vec![TensorMap { param: 0, tile: vec![8, 32], swizzle: 128 }];
    });
    let buffer = device.alloc(256 * 20 + 64, "test").unwrap();
    let syms = SymValues([20, 1, 1, 1, 1, 1]);
    let bound = device.bind(&launches(buffer, &[16]), &syms).unwrap();
    device.run(bound, 0..1, &syms.with(Sym::T, 17), None).unwrap();
    let log = fake.log();
    assert!(log.contains(&"attribute 14 = 1".into()), "{log:?}");
    assert!(log.contains(&"map 3 [64, 20] [256] [32, 8] 0 3 3 0".into()), "{log:?}");
    assert!(log.contains(&"launch count 272x1x1 of 128, 65536 bytes, cluster 16, dependent".into()), "{log:?}");
    let error = device.bind(&launches(buffer, &[8]), &syms).unwrap_err().to_string();
    assert!(error.contains("launch 0 (count)") && error.contains("16 bytes do not divide"), "{error}");
}

#[test]
fn teams_that_wait_for_one_another_run_at_once() {
    let fake = Fake::new(&[]);
    let team = |team: u32| {
        move |header: &mut Header| {
            let gpu = header.kernels[0].gpu.as_mut().unwrap();
            (gpu.persistent, gpu.team, gpu.apart, gpu.scratch_bytes) = (true, team, true, 256);
        }
    };
    let mut device = loaded(&fake, team(4));
    let buffer = device.alloc(256 * 20 + 64, "test").unwrap();
    let syms = SymValues([20, 1, 1, 1, 1, 1]);
    let bound = device.bind(&launches(buffer, &[16]), &syms).unwrap();
    device.run(bound, 0..1, &syms.with(Sym::T, 1), None).unwrap();
    let log = fake.log();
    assert!(log.contains(&"launch count 4x1x1 of 128, 65536 bytes, cluster 1, together".into()), "{log:?}");
    // No GPU has as many multiprocessors.
    let (mut header, native, portable) = gpu_header();
    team(1 << 20)(&mut header);
    let error = fake.refusal(&header, Code { native: &native, portable: &portable });
    assert!(error.contains("room for 1048576 blocks at once"), "{error}");
}

#[test]
fn what_leaves_a_buffer_is_refused() {
    let fake = Fake::new(&[]);
    let mut device = loaded(&fake, |_| ());
    let buffer = device.alloc(4000, "test").unwrap();
    let limits = SymValues([1000, 1, 1, 1, 1, 1]);
    let error = device.bind(&launches(buffer, &[0, 4]), &limits).unwrap_err().to_string();
    assert!(error.contains("launch 1 (count)") && error.contains("parameter out"), "{error}");
    let bound = device.bind(&launches(buffer, &[0]), &limits).unwrap();
    assert!(device.run(bound, 0..1, &limits.with(Sym::T, 1001), None).is_err());
    assert!(device.run(bound, 0..2, &limits, None).is_err());
    assert!(device.run(Bound(7), 0..1, &limits, None).is_err());
    assert!(device.upload(buffer, 3999, &[0; 2]).is_err());
    assert!(device.upload(buffer, u64::MAX, &[0; 2]).is_err());
    assert!(device.read(buffer, 3999, &mut [0; 2]).is_err());
    assert!(device.read(Buffer(9), 0, &mut [0; 2]).is_err());
    // Results and inputs that are larger than what they go through.
    let large = device.alloc(20 << 20, "test").unwrap();
    let bytes: Vec<u8> = (0..20 << 20).map(|i: u32| (i ^ (i >> 9)) as u8).collect();
    device.upload(large, 0, &bytes).unwrap();
    let mut back = vec![0; bytes.len() - 5];
    device.read(large, 5, &mut back).unwrap();
    assert!(back == bytes[5..]);
    fake.set(FAULT, 700);
    let error = device.read(buffer, 0, &mut [0; 4]).unwrap_err().to_string();
    assert_eq!(error, "cuStreamSynchronize failed with 700: CUDA_ERROR_ILLEGAL_ADDRESS, as the test asked");
}

#[test]
fn too_little_memory_is_told_with_what_is_free() {
    let fake = Fake::new(&[(MEMORY, 1 << 20)]);
    let mut device = loaded(&fake, |_| ());
    let buffer = device.alloc(1 << 19, "caches").unwrap();
    assert_eq!(counts(&mut device, buffer, 3), [0, 0, 0]);
    let error = device.alloc(1 << 20, "caches").unwrap_err().to_string();
    assert!(error.contains("no memory for 1048576 bytes of caches: GPU 0 (Fake H200) has 5242"), "{error}");
    assert!(error.contains("bytes free of 1048576; use a smaller context"), "{error}");
    let entry = WeightEntry {
        name: "w".into(),
        shape: vec![1000, 1000],
        elem: Elem::Plain(DType::Bf16),
        source: WeightSource::Tensors(Vec::new()),
    };
    let weights = Weights::random(&[entry], 1, 64).unwrap();
    let error = device.check_room(&weights, 10).unwrap_err().to_string();
    assert!(error.contains("no memory for 2000010 bytes of weights, caches and intermediate results"), "{error}");
}

/// Weights on the device are what they are in host memory, whether they come from files or are made up.
#[test]
fn weights_arrive() {
    let f32s = |n: usize| (0..n).flat_map(|i| (i as f32).sin().to_le_bytes()).collect::<Vec<u8>>();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    write_tensors(
        &path,
        &[
            ("a", "F32", &[700, 1000], f32s(700_000)),
            ("q", "F8_E4M3", &[300, 200], (0..60_000u32).map(|i| (i % 120) as u8).collect()),
            ("q_scale_inv", "F32", &[3, 2], f32s(6)),
        ],
    );
    let checkpoint = Arc::new(Checkpoint::open(dir.path()).unwrap());
    let quant = Elem::Quant(Quant { block: [128, 128], pow2: false });
    let entry = |name: &str, shape: &[u32], elem, source| WeightEntry {
        name: name.into(),
        shape: shape.to_vec(),
        elem,
        source,
    };
    let mut q = part("q", [300, 200]);
    q.scale = Some("q_scale_inv".into());
    let a = || WeightSource::Tensors(vec![part("a", [700, 1000])]);
    let entries = [
        entry("whole", &[700, 1000], Elem::Plain(DType::F32), a()),
        entry("half", &[700, 1000], Elem::Plain(DType::Bf16), a()),
        entry("q", &[300, 200], quant, WeightSource::Tensors(vec![q])),
        entry(
            "gain",
            &[70],
            Elem::Plain(DType::F32),
            WeightSource::Tensors(vec![{
                let mut row = part("a", [700, 1000]);
                (row.rows, row.cols) = ([3, 4], [5, 75]);
                row
            }]),
        ),
        entry("rope", &[0, 4], Elem::Plain(DType::F32), WeightSource::RopeTable { frequencies: vec![1.0, 0.1] }),
        entry("hadamard", &[8, 8], Elem::Plain(DType::Bf16), WeightSource::Hadamard { n: 8 }),
    ];
    let random = || Weights::random(&entries, 7, 64).unwrap();
    let open = || Weights::open(&entries, &checkpoint, 64).unwrap();
    let sources: [(&str, &dyn Fn() -> Weights); 2] = [("files", &open), ("random", &random)];
    for (source, weights) in sources {
        let fake = Fake::new(&[]);
        let mut device = loaded(&fake, |_| ());
        let mut expected: Weights = weights();
        expected.make(2, &|_, _| {}).unwrap();
        let last = std::sync::Mutex::new((0, 0));
        let total = expected.total_bytes();
        let progress = |done, all| *last.lock().unwrap() = (done, all);
        let buffers = device.load_weights(&Arc::new(weights()), &progress).unwrap();
        assert!(last.lock().unwrap().0.abs_diff(total) < 2000 && last.lock().unwrap().1 == total, "{source}");
        for (i, &buffer) in buffers.iter().enumerate() {
            let mut bytes = vec![0; expected.weight_bytes(i) as usize];
            device.read(buffer, 0, &mut bytes).unwrap();
            assert!(bytes == expected.bytes(i), "{source}: {}", entries[i].name);
        }
        assert!(device.upload(buffers[0], 0, &[0]).is_err());
        let error = device.bind(&launches(buffers[0], &[0]), &SymValues([1; 6])).unwrap_err().to_string();
        assert!(error.contains("writes a weight"), "{error}");
        // A second device has the same weights, and ends without them.
        let mut other = GpuDevice::sharing(device.loaded(), 1).unwrap();
        drop(device);
        let mut word = [0; 4];
        other.read(buffers[0], 4, &mut word).unwrap();
        assert_eq!(word, expected.bytes(0)[4..8]);
        drop(other);
        assert_eq!(fake.used(), 0);
    }
}

/// Where [`a_model_of_this_driver`] finds its artifact and checkpoint.
const MODEL_VARIABLE: &str = "DSC_TEST_MODEL";

/// Runs `a_model_of_this_driver` on an artifact, with the driver that the environment names: only a process of its own may set that.
fn run_model(vendor: Vendor, driver: &Path, folder: &Path) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "gpu::tests::a_model_of_this_driver", "--ignored", "--nocapture"]);
    command.env(Spec::of(vendor).variable, driver).env(MODEL_VARIABLE, folder);
    let output = command.output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn models_run_where_they_were_compiled_for() {
    let (mut header, native, _) = gpu_header();
    header.kernels[0].gpu.as_mut().unwrap().asm = [0, 0];
    let dir = tempfile::tempdir().unwrap();
    write_artifact(dir.path(), &mut header, &native);
    write_checkpoint(dir.path());
    let fake = Fake::new(&[]);
    let (passed, said) = run_model(fake.vendor, &fake.path, dir.path());
    assert!(passed, "{said}");
    let (passed, said) = run_model(fake.vendor, Path::new("/nowhere/libcuda.so"), dir.path());
    assert!(!passed && said.contains("no CUDA driver"), "{said}");
}

#[test]
#[ignore = "run by other tests, with their driver"]
fn a_model_of_this_driver() {
    let dir = PathBuf::from(std::env::var_os(MODEL_VARIABLE).expect("run by another test"));
    let artifact = dir.join("toy.dsc");
    for weights in [WeightsFrom::Folder(&dir), WeightsFrom::Random(3)] {
        let model = Model::open(&artifact, weights, &Options::default()).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(model.weights().made_bytes(), 0, "they are on the device only");
        let (mut one, mut other) = (model.session().unwrap(), model.session().unwrap());
        assert!(one.device().starts_with("Fake "), "{}", one.device());
        let options = GenerateOptions { max_new_tokens: 5, ignore_eos: true, ..GenerateOptions::default() };
        for session in [&mut one, &mut other] {
            let generation = session.generate(&[1, 2, 3], &options, &mut |_| ControlFlow::Continue(())).unwrap();
            // The kernel leaves the logits alone: zeros, of which the first is the likeliest.
            assert_eq!(generation.token_ids, [0; 5]);
        }
    }
    let none = Model::open(&artifact, &dir, &Options { device: 1, ..Options::default() }).unwrap_err().to_string();
    assert!(none.contains("there is no GPU 1, the driver sees 1; give another"), "{none}");
}
